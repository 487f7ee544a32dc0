"""Losses of values: of regression, and of independent yes-or-no questions."""

from typing import Any

import attrs
from torch import Tensor
from torch.nn import functional as F

from forgather_fn.describe import described
from forgather_fn.losses.base import Objective
from forgather_fn.losses.finding import target_of
from forgather_fn.losses.pairing import by_value
from forgather_fn.losses.terms import ElementLosses, Term, Terms, objective


def _of_values(losses: ElementLosses, name: str) -> Objective:
    made = objective(Terms(pairing=by_value(name), summands=(Term(losses=losses),)))
    return attrs.evolve(made, description=name)


_mse = _of_values(lambda p, y, _: F.mse_loss(p, y.to(p.dtype), reduction="none"), "mse")


def _mse_total(outputs: Any, batch: Any) -> Tensor:
    assert _mse.terms is not None
    prediction, target = _mse.terms.pairing.predictions(outputs, batch), target_of(batch)
    if prediction.dtype.itemsize < 4:
        prediction, target = prediction.float(), target.float()
    return F.mse_loss(prediction, target, reduction="sum")


mse = attrs.evolve(_mse, total=_mse_total, weight=lambda batch: target_of(batch).numel())
"""Squared error, a mean over all elements of the target."""

l1 = _of_values(lambda p, y, _: F.l1_loss(p, y.to(p.dtype), reduction="none"), "l1")
"""Absolute error, a mean over all elements of the target."""

binary_cross_entropy = _of_values(
    lambda p, y, _: F.binary_cross_entropy_with_logits(p, y.to(p.dtype), reduction="none"), "binary_cross_entropy"
)
"""Independent yes-or-no questions: logits against targets of the same shape, from 0 to 1, of any data type; a mean over
all elements."""


@described
def huber(*, delta: float = 1.0) -> Objective:
    """Take the squared error of small differences and the absolute one of large ones, a mean over all elements.

    Source: Huber, "Robust Estimation of a Location Parameter", 1964; equal to ``torch.nn.HuberLoss``.

    Args:
        delta: Where the one becomes the other, in units of the target.

    Raises:
        ValueError: It is not positive.
    """
    if not 0 < delta < float("inf"):
        raise ValueError(f"huber: delta must be a positive number, got {delta}")

    def losses(predictions: Tensor, targets: Tensor, beside: Tensor | None) -> Tensor:
        del beside
        return F.huber_loss(predictions, targets.to(predictions.dtype), reduction="none", delta=delta)

    return _of_values(losses, "huber")
