"""Schedules: pure functions from a step to a value, most often the learning rate.

``step`` is the number of optimizer updates already begun: step 0 is the rate of the first update, as in torch's
``LambdaLR``, and the last of ``total`` updates reads step ``total - 1``. The words that the factories share:

    peak: The highest value, reached when the warm-up ends.
    warmup: Length of the straight rise from 0 to ``peak``, in optimizer steps.
    total: Length of the whole schedule, warm-up included, in optimizer steps. From there on the value is ``final``.
    final: The value at the end, at most ``peak``.

A factory raises ``ValueError`` where a number is negative or not finite, or where arguments contradict each other.
References are those of torch 2.13 and transformers 5.23; "to rounding" means within 1e-12 of the peak.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from forgather_fn.describe import describe, described


class Schedule(Protocol):
    """A pure function of the step: the same step gives the same value, in any order and in any process."""

    def __call__(self, step: int, /) -> float:
        """Give the value at a step, counted in optimizer updates from 0."""


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


def one_minus_sqrt(progress: float, /) -> float:
    """Fall fast, then slowly (Hägele et al., arXiv 2405.18392)."""
    return 1.0 - math.sqrt(progress)


@described
def constant(value: float, *, warmup: int = 0) -> Schedule:
    """Hold one value. Bit for bit transformers' ``get_constant_schedule_with_warmup``.

    Example:
        >>> [constant(0.1, warmup=2)(step) for step in range(4)]
        [0.0, 0.05, 0.1, 0.1]
    """
    _check(float, value=value)
    _check(int, warmup=warmup)
    return _schedule(value, value, warmup, lambda step: 1.0)


@described
def linear(*, peak: float, warmup: int = 0, total: int, final: float = 0.0) -> Schedule:
    """Fall in a straight line.

    Bit for bit transformers' ``get_linear_schedule_with_warmup`` (``final=0``); to rounding torch's ``LinearLR``.

    Example:
        >>> [linear(peak=1.0, warmup=2, total=6)(step) for step in range(8)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    _check_decay(peak, final, warmup, total)
    return _schedule(peak, final, warmup, lambda step: max(0, total - step) / max(1, total - warmup))


@described
def cosine(*, peak: float, warmup: int = 0, total: int, final: float = 0.0) -> Schedule:
    """Fall along half a cosine wave (Loshchilov and Hutter, arXiv 1608.03983).

    Up to ``total``, bit for bit transformers' ``get_cosine_schedule_with_warmup`` and ``..._with_min_lr_...``, and to
    rounding torch's ``CosineAnnealingLR``. Past ``total`` those climb again; this one stays.

    Example:
        >>> [round(cosine(peak=1.0, warmup=1, total=5, final=0.2)(step), 3) for step in range(7)]
        [0.0, 1.0, 0.883, 0.6, 0.317, 0.2, 0.2]
    """
    _check_decay(peak, final, warmup, total)
    return _schedule(peak, final, warmup, _fall(warmup, total, half_cosine))


@described
def cosine_with_restarts(*, peak: float, warmup: int = 0, total: int, cycles: int, final: float = 0.0) -> Schedule:
    """Fall along ``cycles`` equal half cosines, each from the peak.

    Bit for bit transformers' ``get_cosine_with_hard_restarts_schedule_with_warmup`` (``final=0``), its rounding
    included: from 22 cycles on, a restart may come one step late. Up to ``total``, to rounding, torch's
    ``CosineAnnealingWarmRestarts`` of period ``total / cycles``.

    Example:
        >>> [round(cosine_with_restarts(peak=1.0, total=4, cycles=2)(step), 3) for step in range(6)]
        [1.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    _check_decay(peak, final, warmup, total)
    _check(int, 1, cycles=cycles)
    return _schedule(peak, final, warmup, _fall(warmup, total, lambda done: half_cosine((cycles * done) % 1.0)))


@described
def polynomial(*, peak: float, warmup: int = 0, total: int, power: float, final: float = 0.0) -> Schedule:
    """Fall as a power of the share of the decay that is left.

    To rounding transformers' ``get_polynomial_decay_schedule_with_warmup`` and torch's ``PolynomialLR``.

    Example:
        >>> [polynomial(peak=1.0, total=4, power=2.0)(step) for step in range(6)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """
    _check_decay(peak, final, warmup, total)
    _check(float, power=power)
    return _schedule(peak, final, warmup, _fall(warmup, total, lambda done: float((1.0 - done) ** power)))


@described
def inverse_sqrt(*, peak: float, warmup: int = 0, timescale: int | None = None) -> Schedule:
    """Fall, without end, as ``peak / sqrt(1 + (step - warmup) / timescale)``.

    Bit for bit transformers' ``get_inverse_sqrt_schedule``. Without a timescale it is ``warmup``, as in the Transformer
    (Vaswani et al., arXiv 1706.03762), or 10,000 optimizer steps where there is no warm-up either.

    Example:
        >>> [inverse_sqrt(peak=1.0, warmup=2)(step) for step in (0, 1, 2, 8, 32)]
        [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    _check(float, peak=peak)
    _check(int, warmup=warmup)
    scale = (warmup or 10_000) if timescale is None else timescale
    _check(int, 1, timescale=scale)
    return _schedule(peak, 0.0, warmup, lambda step: 1.0 / math.sqrt((step + (scale - warmup)) / scale))


@described
def warmup_stable_decay(
    *, peak: float, warmup: int = 0, stable: int, decay: int, final: float = 0.0, curve: Curve = half_cosine
) -> Schedule:
    """Rise from ``final``, not 0; hold the peak ``stable`` steps; fall to ``final`` in ``decay`` steps along ``curve``.

    Bit for bit transformers' ``get_wsd_schedule`` with its linear warm-up (MiniCPM, arXiv 2404.06395); its decay types
    are the curves :func:`half_cosine`, :func:`straight` and :func:`one_minus_sqrt`.

    Example:
        >>> [warmup_stable_decay(peak=1.0, warmup=2, stable=2, decay=4, curve=straight)(step) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    _check(int, warmup=warmup, stable=stable, decay=decay)
    _check_decay(peak, final, warmup, warmup + stable + decay)
    if not (callable(curve) and abs(curve(0.0) - 1.0) < 1e-9 and abs(curve(1.0)) < 1e-9):
        raise ValueError(f"curve={describe(curve)}: expected a function that falls from 1 at 0.0 to 0 at 1.0")
    fall = _fall(warmup + stable, warmup + stable + decay, curve)
    return _schedule(peak, final, 0, lambda step: step / warmup if step < warmup else fall(step))


@described
def one_cycle(
    *, peak: float, total: int, pct_start: float = 0.3, div_factor: float = 25.0, final_div_factor: float = 1e4
) -> Schedule:
    """Rise along half a cosine wave, then fall far below the start (Smith and Topin, arXiv 1708.07120).

    ``pct_start`` is the share of the steps that rise: the peak is at step ``pct_start * total - 1``. The first value is
    ``peak / div_factor``, and the last that over ``final_div_factor``; both factors are at least 1. Bit for bit torch's
    two-phase ``OneCycleLR``, up to its end at step ``total - 1``; momentum is not cycled.

    Example:
        >>> [round(one_cycle(peak=1.0, total=6, pct_start=0.5, div_factor=4.0)(step), 3) for step in range(7)]
        [0.25, 0.625, 1.0, 0.75, 0.25, 0.0, 0.0]
    """
    _check_decay(peak, 0.0, 0, total)
    _check(float, pct_start=pct_start)
    _check(float, 1, div_factor=div_factor, final_div_factor=final_div_factor)
    if pct_start > 1:
        raise ValueError(f"pct_start={pct_start!r}: expected the share of the steps that rise, from 0 to 1")
    first, top, last = peak / div_factor, pct_start * total - 1, total - 1
    end = first / final_div_factor

    def at(step: int, /) -> float:
        if top > 0 and step <= top:
            return peak + (first - peak) * half_cosine(step / top)
        # Where the fall has no length (top == last == 0), its one step has the peak.
        return end + (peak - end) * half_cosine((min(step, last) - top) / ((last - top) or 1.0))

    return at


@described
def piecewise(*, boundaries: Sequence[int], values: Sequence[float]) -> Schedule:
    """Hold ``values[i]`` until step ``boundaries[i]``, where the next begins. To rounding torch's ``MultiStepLR``.

    Example:
        >>> [piecewise(boundaries=(2, 4), values=(1.0, 0.1, 0.01))(step) for step in range(6)]
        [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    _check_boundaries(boundaries, len(values))
    _check(float, **{f"values[{index}]": value for index, value in enumerate(values)})
    starts, pieces = tuple(boundaries), tuple(values)
    return lambda step: pieces[bisect_right(starts, step)]


@described
def joined(*schedules: Schedule | float, boundaries: Sequence[int]) -> Schedule:
    """Follow schedules in turn; each counts its steps from the boundary where it starts. As torch's ``SequentialLR``.

    Example:
        >>> [joined(1.0, linear(peak=1.0, total=2), boundaries=(3,))(step) for step in range(6)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    _check_boundaries(boundaries, len(schedules))
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
        >>> scaled(linear(peak=1.0, total=4), factor=0.5)(1)
        0.375
    """
    _check(float, factor=factor)
    rate(schedule, 0)  # refused now, as in joined
    return lambda step: factor * rate(schedule, step)


def rate(schedule: Schedule | float, step: int) -> float:
    """Evaluate a schedule, or a constant number, at a step.

    Raises:
        ValueError: The value is not one finite number of at least 0.

    Example:
        >>> rate(0.1, 7), rate(linear(peak=1.0, total=4), 1)
        (0.1, 0.75)
    """
    value = schedule(step) if callable(schedule) else schedule
    try:
        if math.isfinite(value) and value >= 0:
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass  # what strings, arrays, huge integers, and tensors that are not one number raise
    raise ValueError(
        f"schedule {describe(schedule)} gave {value!r} at step {step}: expected one finite number of at least 0"
    )


def _schedule(peak: float, final: float, warmup: int, share: Schedule) -> Schedule:
    """Rise from 0 to the peak, then be a share of the way up from the end to it: the references' arithmetic."""
    floor = final / peak if peak else 0.0
    return lambda step: peak * (step / warmup if step < warmup else share(step) * (1.0 - floor) + floor)


def _fall(start: int, stop: int, curve: Curve) -> Schedule:
    """Follow a curve from one step to another; 1 before, 0 after."""
    return lambda step: curve(max(0, step - start) / (stop - start)) if step < stop else 0.0


def _check(kind: type, least: int = 0, /, **given: float) -> None:
    """Refuse all but plain, finite numbers: numpy's print otherwise, and a schedule's text is compared on resume."""
    for name, value in given.items():
        if type(value) not in (int, kind) or not least <= value < math.inf:
            raise ValueError(f"{name}={value!r}: expected a plain, finite {kind.__name__}, at least {least}")


def _check_decay(peak: float, final: float, warmup: int, total: int) -> None:
    _check(float, peak=peak, final=final)
    _check(int, warmup=warmup)
    _check(int, 1, total=total)
    if final > peak:
        raise ValueError(f"final={final!r} is above peak={peak!r}: expected a fall; for a rise, use a warm-up")
    if warmup > total:
        raise ValueError(f"warmup={warmup} is longer than total={total}, which includes it: lower it or raise total")


def _check_boundaries(boundaries: Sequence[int], pieces: int) -> None:
    _check(int, 1, **{f"boundaries[{index}]": boundary for index, boundary in enumerate(boundaries)})
    if pieces != len(boundaries) + 1:
        raise ValueError(f"boundaries={tuple(boundaries)} make {len(boundaries) + 1} pieces, but {pieces} were given")
    if any(after <= before for before, after in pairwise(boundaries)):
        raise ValueError(f"boundaries={tuple(boundaries)}: expected steps from the start, each after the one before it")
