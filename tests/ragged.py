"""A language-model task whose samples weigh unequally, for comparing runs of one process with those of several."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import forgather_fn as ff


def rows(count: int = 22) -> dict[str, torch.Tensor]:
    """Give ``ids`` below 11 and their labels, of which rows have between one and five."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 11, (count, 6), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, 1 + row % 5 :] = -100  # so that tokens are unequal in number
    return {"ids": ids, "labels": labels}


def plan_of(model: Callable[[], nn.Module], **changes: Any) -> ff.Plan:
    """Make a plan that uses whatever processes have to agree on, in float64."""
    given: dict[str, Any] = {
        "model": model,
        "loss": ff.losses.causal_lm,
        "optimizer": ff.adamw(weight_decay=0.1),
        "schedule": ff.schedules.cosine(peak=1e-2, warmup=2, total=12),
        "transforms": (ff.clipped(0.3),),
        "average": ff.ema(0.9),
        "microbatches": 8,
        "precision": "float64",
    }
    return ff.Plan(**given | changes)
