"""Reducers that ask whether a result still improves."""

import math
from typing import Literal

from forgather_fn.describe import described
from forgather_fn.reducers.base import Kept, Reducer

Threshold = Literal["relative", "absolute"]


def _worst(greater_is_better: bool) -> float:
    return -math.inf if greater_is_better else math.inf


def improved(number: float, best: float, by: float, *, greater_is_better: bool) -> bool:
    """Say whether a number is better than the best by more than a margin; nan never is."""
    return number > best + by if greater_is_better else number < best - by


@described
def stale(*, min_delta: float = 0.0, greater_is_better: bool = False) -> Reducer:
    """Count the numbers since the last one that was better than all before.

    Args:
        min_delta: By how much a number must be better than the best to count.
        greater_is_better: Of the numbers compared; False where less is better.

    Raises:
        ValueError: ``min_delta`` is negative, or no number.

    Example:
        >>> counting = stale()
        >>> kept = counting.init()
        >>> for number in (3.0, 2.0, 2.5, 2.0):
        ...     kept = counting.add(kept, number)
        >>> counting.result(kept), kept
        (2, {'best': 2.0, 'poor': 2})
    """
    if not min_delta >= 0:
        raise ValueError(f"stale: min_delta must be a number of at least 0, got {min_delta}")

    def add(kept: Kept, number: float) -> Kept:
        if improved(number, kept["best"], min_delta, greater_is_better=greater_is_better):
            return {"best": number, "poor": 0}
        return {"best": kept["best"], "poor": kept["poor"] + 1}

    return Reducer(lambda: {"best": _worst(greater_is_better), "poor": 0}, add, lambda kept: kept["poor"])


@described
def plateau(
    *,
    factor: float,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Threshold = "relative",
    cooldown: int = 0,
    greater_is_better: bool = False,
) -> Reducer:
    """Give a factor that shrinks when numbers have stopped improving.

    Source: ``torch.optim.lr_scheduler.ReduceLROnPlateau``, whose arithmetic it has; that one's ``eps``, below which it
    leaves a change out, is 0 here.

    Args:
        factor: What the result is multiplied by at each plateau, in (0, 1).
        patience: How many numbers in a row may be no better than the best; one more is a plateau.
        threshold: By how much a number must be better than the best to count.
        threshold_mode: Whether that is a share of the best, or absolute.
        cooldown: How many numbers after a plateau are not counted.
        greater_is_better: Of the numbers compared; False where less is better.

    Raises:
        ValueError: A number is out of its range.
    """
    if not 0 < factor < 1:
        raise ValueError(f"plateau: factor must be in (0, 1), got {factor}")
    if patience < 0 or cooldown < 0 or not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(
            f"plateau: patience, cooldown and threshold must be at least 0; got {patience}, {cooldown} and {threshold}"
        )

    def better(number: float, best: float) -> bool:
        if threshold_mode == "relative":  # torch's arithmetic, to the bit
            return number > best * (1.0 + threshold) if greater_is_better else number < best * (1.0 - threshold)
        return improved(number, best, threshold, greater_is_better=greater_is_better)

    def add(kept: Kept, number: float) -> Kept:
        better_now = better(number, kept["best"])
        best, poor = (number, 0) if better_now else (kept["best"], kept["poor"] + 1)
        cooling, reached = kept["cooldown"], kept["factor"]
        if cooling:
            cooling, poor = cooling - 1, 0
        if poor > patience:
            reached, cooling, poor = reached * factor, cooldown, 0
        return {"best": best, "poor": poor, "cooldown": cooling, "factor": reached}

    def init() -> Kept:
        return {"best": _worst(greater_is_better), "poor": 0, "cooldown": 0, "factor": 1.0}

    return Reducer(init, add, lambda kept: kept["factor"])
