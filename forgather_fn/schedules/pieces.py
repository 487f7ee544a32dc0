"""Schedules made of pieces, and of other schedules."""

from bisect import bisect_right
from collections.abc import Sequence

from forgather_fn.describe import describe, described
from forgather_fn.schedules.base import Curve, Schedule, check, check_boundaries, rate


@described
def piecewise(*, boundaries: Sequence[int], values: Sequence[float]) -> Schedule:
    """Hold ``values[i]`` until step ``boundaries[i]``, where the next begins. To rounding torch's ``MultiStepLR``.

    Example:
        >>> [piecewise(boundaries=(2, 4), values=(1.0, 0.1, 0.01))(step) for step in range(6)]
        [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    check_boundaries(boundaries, len(values))
    check(float, **{f"values[{index}]": value for index, value in enumerate(values)})
    starts, pieces = tuple(boundaries), tuple(values)
    return lambda step: pieces[bisect_right(starts, step)]


@described
def joined(*schedules: Schedule | float, boundaries: Sequence[int]) -> Schedule:
    """Follow schedules in turn; each counts its steps from the boundary where it starts. As torch's ``SequentialLR``.

    Example:
        >>> from forgather_fn.schedules import linear
        >>> [joined(1.0, linear(peak=1.0, total=2), boundaries=(3,))(step) for step in range(6)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    check_boundaries(boundaries, len(schedules))
    for schedule in schedules:
        rate(schedule, 0)  # what is no schedule is refused now, not when its turn comes
    starts = (0, *boundaries)

    def at(step: int, /) -> float:
        piece = bisect_right(starts, step) - 1
        return rate(schedules[piece], step - starts[piece])

    return at


@described
def scaled(schedule: Schedule | float, *, factor: float) -> Schedule:
    """Multiply a schedule by a constant.

    Example:
        >>> from forgather_fn.schedules import linear
        >>> scaled(linear(peak=1.0, total=4), factor=0.5)(1)
        0.375
    """
    check(float, factor=factor)
    rate(schedule, 0)  # refused now, as in joined
    return lambda step: factor * rate(schedule, step)


@described
def along(curve: Curve, *, start: float, stop: float, steps: int) -> Schedule:
    """Go from one value to another along a curve in a number of steps, and stay there.

    Example:
        >>> from forgather_fn.schedules import straight
        >>> [along(straight, start=0.0, stop=1.0, steps=4)(step) for step in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    check(float, start=start, stop=stop)
    check(int, 1, steps=steps)
    if not callable(curve):
        raise ValueError(f"curve={describe(curve)}: expected a function of the share of the way that is done")
    return lambda step: stop + (start - stop) * curve(min(step / steps, 1.0))


@described
def ahead(schedule: Schedule | float, *, steps: int) -> Schedule:
    """Follow a schedule that number of steps ahead of it, such as a warm-up that does not begin at 0.

    Example:
        >>> from forgather_fn.schedules import constant
        >>> [ahead(constant(0.1, warmup=2), steps=1)(step) for step in range(3)]
        [0.05, 0.1, 0.1]
    """
    check(int, steps=steps)
    rate(schedule, 0)  # refused now, as in joined
    return lambda step: rate(schedule, step + steps)
