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
    "clipped_by_value": Piece(fields=lambda: {"transforms": (ff.transforms.clipped_by_value(0.05),)}),
    "clipped_by_group": Piece(
        fields=lambda: {"transforms": (ff.transforms.clipped_by_group({"*.bias": 0.01, "*": 0.1}),)}
    ),
    "clipped_by_unit": Piece(fields=lambda: {"transforms": (ff.transforms.clipped_by_unit(0.01),)}),
    "centralised": Piece(fields=lambda: {"transforms": (ff.transforms.centralised(),)}),
    "clipped/scheduled": Piece(
        fields=lambda: {"transforms": (ff.clipped(ff.schedules.linear(peak=0.2, total=9)),)},
        outside={"compiled": "a schedule is read on the host; refused"},
    ),
    "noise/annealed": Piece(
        fields=lambda: {"transforms": (ff.noise(ff.transforms.annealed(eta=0.01)),)},
        outside={"compiled": "its keys are of the host; refused"},
    ),
}
