"""Averages of the parameters."""

import forgather_fn as ff
from tests.pieces.piece import Piece

PIECES = {
    "ema": Piece(fields=lambda: {"average": ff.ema(0.5)}),
    "ema/warmup": Piece(fields=lambda: {"average": ff.ema(0.5, warmup=True)}),
    "power_ema": Piece(fields=lambda: {"average": ff.power_ema(6.94)}),
    "swa": Piece(fields=lambda: {"average": ff.swa(start=2, every=2)}),
}
