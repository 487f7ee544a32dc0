"""Low-rank adapters."""

import forgather_fn as ff
from tests import specimens
from tests.pieces.piece import Piece

PIECES = {
    "lora": Piece(
        fields=lambda: {
            "model": ff.lora(specimens.mlp, "*weight", rank=2, alpha=4),
            "optimizer": ff.adamw(weight_decay=0.1),
            "average": ff.ema(0.5),
        }
    )
}
