"""Gradient transforms."""

import torch

import forgather_fn as ff
from tests.pieces.piece import Piece

PIECES = {
    "clipped": Piece(fields=lambda: {"transforms": (ff.clipped(0.1),)}),
    "noise": Piece(
        fields=lambda: {"transforms": (ff.noise(0.01),)}, outside={"compiled": "its keys are of the host; refused"}
    ),
    "chain": Piece(fields=lambda: {"transforms": (ff.chain(ff.stateless(torch.tanh), ff.clipped(0.1)),)}),
    "stateless": Piece(fields=lambda: {"transforms": (ff.stateless(torch.sign),)}, outside={}),
}
