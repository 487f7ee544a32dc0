"""Losses of regression."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from forgather_fn.losses.base import Objective
from forgather_fn.losses.finding import TARGETS, logits_of, target_of


def _mse_total(outputs: Any, batch: Any) -> Tensor:
    prediction, target = logits_of(outputs), target_of(batch)
    if prediction.shape != target.shape:
        raise ValueError(
            f"mse: the prediction's shape {tuple(prediction.shape)} is not the target's {tuple(target.shape)}; "
            "reshape one of them, for example the target with unsqueeze(-1)"
        )
    if prediction.dtype.itemsize < 4:
        prediction, target = prediction.float(), target.float()
    return F.mse_loss(prediction, target, reduction="sum")


mse = Objective(total=_mse_total, weight=lambda batch: target_of(batch).numel(), withheld=TARGETS, description="mse")
"""Squared error, a mean over all elements of the target."""
