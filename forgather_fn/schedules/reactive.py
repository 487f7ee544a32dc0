"""Schedules that react to results."""

from forgather_fn.describe import described
from forgather_fn.reducers import Control, Kept, plateau
from forgather_fn.reducers.improvement import Threshold
from forgather_fn.schedules.base import Reactive, Schedule, check, rate


@described
def on_plateau(
    base: Schedule | float,
    *,
    metric: str = "eval_loss",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: Threshold = "relative",
    cooldown: int = 0,
    minimum: float = 0.0,
    greater_is_better: bool = False,
) -> Reactive:
    """Follow a schedule, times a factor that shrinks when a result has stopped improving.

    The result is one that an observer finds, such as ``ff.every(200, ff.evaluated(data))``: each time it is found, what
    is kept in ``state.controls["plateau"]`` goes on, and the steps after it are at the new rate. It is a schedule for
    ``Plan(schedule=...)``, written around others: ``on_plateau(scaled(...))``.

    Source: ``torch.optim.lr_scheduler.ReduceLROnPlateau``, of which it gives the rates where ``base`` is a number; see
    :func:`~forgather_fn.reducers.plateau`.

    Args:
        base: ``step -> value``, or a number.
        metric: The name of the result.
        factor: What the value is multiplied by at each plateau, in (0, 1).
        patience: How many results in a row may be no better than the best; one more is a plateau.
        threshold: By how much a result must be better than the best to count.
        threshold_mode: Whether that is a share of the best, or absolute.
        cooldown: How many results after a plateau are not counted.
        minimum: What the value does not fall below, where ``base`` is not below it anyway.
        greater_is_better: Of the numbers compared; False where less is better.

    Raises:
        ValueError: A number is out of its range, or ``base`` reacts itself.
    """
    check(float, minimum=minimum)
    rate(base, 0)  # refused now, as in joined
    reducer = plateau(
        factor=factor,
        patience=patience,
        threshold=threshold,
        threshold_mode=threshold_mode,
        cooldown=cooldown,
        greater_is_better=greater_is_better,
    )

    def reaction(value: float, kept: Kept, /) -> float:
        return max(value * reducer.result(kept), min(value, minimum))

    return Reactive(base, Control("plateau", metric, reducer), reaction)
