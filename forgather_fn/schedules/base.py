"""What schedules are, and what they are made of."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

import attrs

from forgather_fn.describe import describe, described
from forgather_fn.reducers import Control, Kept


class Schedule(Protocol):
    """A pure function of the step: the same step gives the same value, in any order and in any process."""

    def __call__(self, step: int, /) -> float:
        """Give the value at a step, counted in optimizer updates from 0."""


class Reaction(Protocol):
    """Change the value of a schedule by what a reducer has kept of the results so far."""

    def __call__(self, value: float, kept: Kept, /) -> float:
        """Give the value that is used."""


@attrs.frozen(repr=False)
class Reactive:
    """A schedule whose values depend on results of the run as well as on the step.

    Attributes:
        base: What it changes.
        control: What it makes of the results; kept in ``state.controls``.
        reaction: ``(value, kept) -> value``.
        description: How it prints.
        misplaced: What to say where it stands in the place of a schedule that does not react.
    """

    base: Schedule | float
    control: Control
    reaction: Reaction
    description: str = ""
    misplaced: ClassVar[str] = "a schedule that reacts is that of the plan, and written around others, not inside them"

    def __repr__(self) -> str:
        return self.description or f"Reactive({describe(self.reaction)})"


class Curve(Protocol):
    """The shape of a decay: a pure function that falls from 1 to 0 while its argument goes from 0 to 1."""

    def __call__(self, progress: float, /) -> float:
        """Give the share of the way that is still above the end."""


def straight(progress: float, /) -> float:
    """Fall in a straight line."""
    return 1.0 - progress


def half_cosine(progress: float, /) -> float:
    """Fall along half a cosine wave: slowly, fast, slowly."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def sqrt_of_rest(progress: float, /) -> float:
    """Fall slowly, then fast: the other way round than :func:`one_minus_sqrt`."""
    return math.sqrt(1.0 - progress)


@described
def wave(cycles: float) -> Curve:
    """Make the curve that goes through a number of whole cosine waves; half a one falls from 1 to 0.

    Example:
        >>> [round(wave(1.0)(share), 3) for share in (0.0, 0.5, 1.0)]
        [1.0, 0.0, 1.0]
    """
    check(float, cycles=cycles)
    return lambda progress: 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress))


def one_minus_sqrt(progress: float, /) -> float:
    """Fall fast, then slowly (Hägele et al., arXiv 2405.18392)."""
    return 1.0 - math.sqrt(progress)


NO_CONTROLS: Final[Mapping[str, Any]] = MappingProxyType({})


def rate(schedule: Schedule | Reactive | float, step: int, controls: Mapping[str, Any] = NO_CONTROLS) -> float:
    """Evaluate a schedule, or a constant number, at a step.

    Args:
        schedule: Which.
        step: Optimizer steps begun.
        controls: Those of the state, which schedules that react read.

    Raises:
        ValueError: The value is not one finite number of at least 0; or the schedule reacts, and there is nothing to
            react to.

    Example:
        >>> from forgather_fn.schedules import linear
        >>> rate(0.1, 7), rate(linear(peak=1.0, total=4), 1)
        (0.1, 0.75)
    """
    if isinstance(schedule, Reactive):
        name = schedule.control.name
        if name not in controls:
            raise ValueError(
                f"{describe(schedule)} reads controls[{name!r}] of the state, which is not there: "
                f"{schedule.misplaced}; a state from before it was in the plan is restored with without={{'controls'}}"
            )
        return float(schedule.reaction(rate(schedule.base, step), controls[name]))
    try:
        value = schedule(step) if callable(schedule) else schedule
    except TypeError as error:
        raise ValueError(f"schedule {describe(schedule)} is no function of a step: {error}") from error
    try:
        if math.isfinite(value) and value >= 0:
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass  # what strings, arrays, huge integers, and tensors that are not one number raise
    raise ValueError(
        f"schedule {describe(schedule)} gave {value!r} at step {step}: expected one finite number of at least 0"
    )


def risen(peak: float, final: float, warmup: int, share: Schedule) -> Schedule:
    """Rise from 0 to the peak, then be a share of the way up from the end to it: the references' arithmetic."""
    floor = final / peak if peak else 0.0
    return lambda step: peak * (step / warmup if step < warmup else share(step) * (1.0 - floor) + floor)


def fall(start: int, stop: int, curve: Curve) -> Schedule:
    """Follow a curve from one step to another; 1 before, 0 after."""
    return lambda step: curve(max(0, step - start) / (stop - start)) if step < stop else 0.0


def check(kind: type, least: int = 0, /, **given: float) -> None:
    """Refuse all but plain, finite numbers: numpy's print otherwise, and a schedule's text is compared on resume."""
    for name, value in given.items():
        if type(value) not in (int, kind) or not least <= value < math.inf:
            raise ValueError(f"{name}={value!r}: expected a plain, finite {kind.__name__}, at least {least}")


def check_decay(peak: float, final: float, warmup: int, total: int) -> None:
    """Refuse the arguments of a decay that contradict each other."""
    check(float, peak=peak, final=final)
    check(int, warmup=warmup)
    check(int, 1, total=total)
    if final > peak:
        raise ValueError(f"final={final!r} is above peak={peak!r}: expected a fall; for a rise, use a warm-up")
    if warmup > total:
        raise ValueError(f"warmup={warmup} is longer than total={total}, which includes it: lower it or raise total")


def check_boundaries(boundaries: Sequence[int], pieces: int) -> None:
    """Refuse boundaries that are not in order, or not one fewer than the pieces."""
    check(int, 1, **{f"boundaries[{index}]": boundary for index, boundary in enumerate(boundaries)})
    if pieces != len(boundaries) + 1:
        raise ValueError(f"boundaries={tuple(boundaries)} make {len(boundaries) + 1} pieces, but {pieces} were given")
    if any(after <= before for before, after in pairwise(boundaries)):
        raise ValueError(f"boundaries={tuple(boundaries)}: expected steps from the start, each after the one before it")
