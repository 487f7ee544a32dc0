"""Losses, and what they are made of."""

from typing import Any

import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn.losses import Objective
from tests import specimens
from tests.pieces.piece import Piece


def named_classes(samples: int) -> dict[str, Tensor]:
    """Classes with whatever a loss can be told besides: weights, masks, what a teacher says."""
    x, y = specimens.ragged_classes(samples)
    draw = torch.Generator().manual_seed(samples)
    return {
        "input": x,
        "labels": y,
        "importance": torch.rand(samples, generator=draw),
        "mask": torch.arange(samples) % 4 != 2,
    }


def words(samples: int) -> dict[str, Tensor]:
    """Words with a weight for each token, and the bytes of each."""
    batch = specimens.words(samples)
    batch["importance"] = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(samples))
    batch["bytes"] = 1 + batch["labels"].clamp(min=0) % 5
    return {**batch, "input": batch.pop("input_ids")}


class Twins(nn.Module):
    """Gives two embeddings of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.one(x), self.other(y)


def teacher() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5))


def of_classes(loss: Objective) -> Piece:
    return Piece(fields=lambda: {"loss": loss}, batch=named_classes)


def of_values(loss: Objective) -> Piece:
    return Piece(fields=lambda: {"loss": loss}, batch=specimens.values)


def of_words(loss: Objective) -> Piece:
    return Piece(fields=lambda: {"loss": loss, "model": specimens.tied_by_object}, batch=words)


def answers(samples: int) -> tuple[Tensor, Tensor]:
    x, y = specimens.values(samples)
    return x, (y > 0).long()


def composed() -> Objective:
    """Whatever goes with a cross-entropy, at once."""
    loss = ff.losses.weighted(ff.losses.ignoring(ff.losses.causal_lm, index=3), by="importance")
    return ff.losses.with_z_loss(ff.losses.smoothed(loss, epsilon=0.1), coefficient=0.01)


entropy, tokens = ff.losses.cross_entropy, ff.losses.causal_lm
PIECES = {
    "causal_lm": of_words(ff.losses.causal_lm),
    "cross_entropy": of_classes(ff.losses.cross_entropy),
    "from_output": Piece(
        fields=lambda: {"loss": ff.losses.from_output(weight="samples"), "model": specimens.Returning},
        batch=specimens.pairs_by_name,
    ),
    "mse": of_values(ff.losses.mse),
    "l1": of_values(ff.losses.l1),
    "huber": of_values(ff.losses.huber(delta=0.5)),
    "binary_cross_entropy": Piece(fields=lambda: {"loss": ff.losses.binary_cross_entropy}, batch=answers),
    "focal": of_classes(ff.losses.focal(gamma=2.0)),
    "smoothed": of_classes(ff.losses.smoothed(entropy, epsilon=0.1)),
    "with_z_loss": of_classes(ff.losses.with_z_loss(entropy, coefficient=0.1)),
    "weighted": of_classes(ff.losses.weighted(entropy, by="importance")),
    "class_weighted": of_classes(ff.losses.class_weighted(entropy, (0.5, 2.0, 1.0))),
    "masked": of_classes(ff.losses.masked(entropy, by="mask")),
    "ignoring": of_words(ff.losses.ignoring(tokens, index=2)),
    "chunked/all that goes with a cross-entropy": of_words(ff.losses.chunked(composed(), tokens=11, head="2")),
    "distilled": Piece(fields=lambda: {"loss": ff.losses.distilled(entropy, teacher=teacher())}, batch=named_classes),
    "contrastive": Piece(
        fields=lambda: {"model": Twins, "loss": ff.losses.contrastive(negatives="microbatch")},
        batch=specimens.values,
        outside={
            "accumulation": "a microbatch has fewer negatives than its batch",
            "evaluation": "the loss of a sample depends on which others are in its batch",
        },
    ),
}
