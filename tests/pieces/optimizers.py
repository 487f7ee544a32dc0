"""Optimizers."""

import torch

import forgather_fn as ff
from tests import specimens
from tests.pieces.piece import Piece, falling

PIECES = {
    "adamw": Piece(fields=lambda: {"optimizer": ff.adamw(weight_decay=0.1)}),
    "adam": Piece(fields=lambda: {"optimizer": ff.adam(weight_decay=0.01)}),
    "sgd": Piece(fields=lambda: {"optimizer": ff.sgd(momentum=0.9, nesterov=True, weight_decay=0.01)}),
    "adamw/scheduled": Piece(
        fields=lambda: {
            "optimizer": ff.adamw(
                weight_decay=falling,
                betas=(falling, 0.9),
                groups=[ff.group("0.*", learning_rate=falling, weight_decay=0.1)],
            )
        }
    ),
    "sgd/scheduled": Piece(fields=lambda: {"optimizer": ff.sgd(momentum=falling, weight_decay=falling)}),
    "optim.lion": Piece(
        fields=lambda: {"optimizer": ff.optim.lion(weight_decay=0.1, betas=(falling, 0.9))},
    ),
    "optim.schedule_free_adamw": Piece(
        fields=lambda: {"optimizer": ff.optim.schedule_free_adamw(weight_decay=falling)},
    ),
    "optim.adafactor": Piece(
        fields=lambda: {"optimizer": ff.optim.adafactor(weight_decay=falling, beta1=falling, relative_step=True)},
    ),
    "optim.muon": Piece(
        fields=lambda: {"optimizer": ff.optim.muon(match="*.weight", momentum=falling, weight_decay=0.1)},
    ),
    "optim.partitioned": Piece(
        fields=lambda: {
            "optimizer": ff.optim.partitioned(
                {
                    "first": ("0.*", ff.sgd(momentum=0.9, groups=[ff.group("0.bias", learning_rate=falling)])),
                    "rest": ("*", ff.optim.schedule_free_adamw(weight_decay=0.1)),
                }
            )
        },
    ),
    "optim.lookahead": Piece(
        fields=lambda: {"optimizer": ff.optim.lookahead(ff.adamw(weight_decay=falling), steps=2)},
    ),
    "optim.master_weights": Piece(
        fields=lambda: {
            "model": specimens.Half,
            "optimizer": ff.optim.master_weights(ff.adamw(weight_decay=falling, betas=(falling, 0.9))),
        },
    ),
    "optim.adamw_bfloat16": Piece(
        fields=lambda: {"optimizer": ff.optim.adamw_bfloat16(weight_decay=falling, betas=(falling, 0.9))},
    ),
    "from_torch": Piece(
        fields=lambda: {"optimizer": ff.from_torch(lambda groups: torch.optim.RMSprop(groups, momentum=0.5))},
        outside={"compiled": "it works on the host, and is refused"},
    ),
}
