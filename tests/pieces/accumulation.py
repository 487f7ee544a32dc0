"""How the gradients of microbatches are added."""

from tests import specimens
from tests.pieces.piece import Piece

PIECES = {
    "accumulate": Piece(
        fields=lambda: {"model": specimens.Half, "accumulate": "float32", "microbatches": 4},
    )
}
