"""Schedules that rise once and then fall, or hold."""

import math

from forgather_fn.describe import describe, described
from forgather_fn.schedules.base import Curve, Schedule, check, check_decay, fall, half_cosine, risen


@described
def constant(value: float, *, warmup: int = 0) -> Schedule:
    """Hold one value. Bit for bit transformers' ``get_constant_schedule_with_warmup``.

    Example:
        >>> [constant(0.1, warmup=2)(step) for step in range(4)]
        [0.0, 0.05, 0.1, 0.1]
    """
    check(float, value=value)
    check(int, warmup=warmup)
    return risen(value, value, warmup, lambda step: 1.0)


@described
def linear(*, peak: float, warmup: int = 0, total: int, final: float = 0.0) -> Schedule:
    """Fall in a straight line.

    Bit for bit transformers' ``get_linear_schedule_with_warmup`` (``final=0``); to rounding torch's ``LinearLR``.

    Example:
        >>> [linear(peak=1.0, warmup=2, total=6)(step) for step in range(8)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    check_decay(peak, final, warmup, total)
    return risen(peak, final, warmup, lambda step: max(0, total - step) / max(1, total - warmup))


@described
def cosine(*, peak: float, warmup: int = 0, total: int, final: float = 0.0) -> Schedule:
    """Fall along half a cosine wave (Loshchilov and Hutter, arXiv 1608.03983).

    Up to ``total``, bit for bit transformers' ``get_cosine_schedule_with_warmup`` and ``..._with_min_lr_...``, and to
    rounding torch's ``CosineAnnealingLR``. Past ``total`` those climb again; this one stays.

    Example:
        >>> [round(cosine(peak=1.0, warmup=1, total=5, final=0.2)(step), 3) for step in range(7)]
        [0.0, 1.0, 0.883, 0.6, 0.317, 0.2, 0.2]
    """
    check_decay(peak, final, warmup, total)
    return risen(peak, final, warmup, fall(warmup, total, half_cosine))


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
    check_decay(peak, final, warmup, total)
    check(int, 1, cycles=cycles)
    return risen(peak, final, warmup, fall(warmup, total, lambda done: half_cosine((cycles * done) % 1.0)))


@described
def polynomial(*, peak: float, warmup: int = 0, total: int, power: float, final: float = 0.0) -> Schedule:
    """Fall as a power of the share of the decay that is left.

    To rounding transformers' ``get_polynomial_decay_schedule_with_warmup`` and torch's ``PolynomialLR``.

    Example:
        >>> [polynomial(peak=1.0, total=4, power=2.0)(step) for step in range(6)]
        [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """
    check_decay(peak, final, warmup, total)
    check(float, power=power)
    return risen(peak, final, warmup, fall(warmup, total, lambda done: float((1.0 - done) ** power)))


@described
def inverse_sqrt(*, peak: float, warmup: int = 0, timescale: int | None = None) -> Schedule:
    """Fall, without end, as ``peak / sqrt(1 + (step - warmup) / timescale)``.

    Bit for bit transformers' ``get_inverse_sqrt_schedule``. Without a timescale it is ``warmup``, as in the Transformer
    (Vaswani et al., arXiv 1706.03762), or 10,000 optimizer steps where there is no warm-up either.

    Example:
        >>> [inverse_sqrt(peak=1.0, warmup=2)(step) for step in (0, 1, 2, 8, 32)]
        [0.0, 0.5, 1.0, 0.5, 0.25]
    """
    check(float, peak=peak)
    check(int, warmup=warmup)
    scale = (warmup or 10_000) if timescale is None else timescale
    check(int, 1, timescale=scale)
    return risen(peak, 0.0, warmup, lambda step: 1.0 / math.sqrt((step + (scale - warmup)) / scale))


@described
def warmup_stable_decay(
    *, peak: float, warmup: int = 0, stable: int, decay: int, final: float = 0.0, curve: Curve = half_cosine
) -> Schedule:
    """Rise from ``final``, not 0; hold the peak ``stable`` steps; fall to ``final`` in ``decay`` steps along ``curve``.

    Bit for bit transformers' ``get_wsd_schedule`` with its linear warm-up (MiniCPM, arXiv 2404.06395); its decay types
    are the curves :func:`half_cosine`, :func:`straight` and :func:`one_minus_sqrt`.

    Example:
        >>> from forgather_fn.schedules import straight
        >>> [warmup_stable_decay(peak=1.0, warmup=2, stable=2, decay=4, curve=straight)(step) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    check(int, warmup=warmup, stable=stable, decay=decay)
    check_decay(peak, final, warmup, warmup + stable + decay)
    if not (callable(curve) and abs(curve(0.0) - 1.0) < 1e-9 and abs(curve(1.0)) < 1e-9):
        raise ValueError(f"curve={describe(curve)}: expected a function that falls from 1 at 0.0 to 0 at 1.0")
    falling = fall(warmup + stable, warmup + stable + decay, curve)
    return risen(peak, final, 0, lambda step: step / warmup if step < warmup else falling(step))


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
    check_decay(peak, 0.0, 0, total)
    check(float, pct_start=pct_start)
    check(float, 1, div_factor=div_factor, final_div_factor=final_div_factor)
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
