"""Averages of the parameters."""

import forgather_fn as ff
from tests.pieces.piece import Piece

PIECES = {"ema": Piece(fields=lambda: {"average": ff.ema(0.5)})}
