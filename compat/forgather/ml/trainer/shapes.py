"""The shapes of the learning rate that arguments name, as schedules of :mod:`forgather_fn.schedules` with a peak of 1.

Their keyword arguments are those of transformers' own functions. Where a warm-up is longer than the run, as in a short
trial of a long recipe, the rate is still rising when the run ends.
"""

from collections.abc import Mapping
from typing import Final

from forgather_fn import schedules
from forgather_fn.schedules import Curve, Schedule

CURVES: Final[Mapping[str, Curve]] = {
    "linear": schedules.straight,
    "cosine": schedules.half_cosine,
    "1-sqrt": schedules.one_minus_sqrt,
}
"""What the decay of ``warmup_stable_decay`` may be."""

RISES: Final[Mapping[str, Curve]] = {**CURVES, "1-sqrt": schedules.sqrt_of_rest}
"""What its warm-up may be."""


def linear(*, num_warmup_steps: int, num_training_steps: int) -> Schedule:
    """Rise, then fall in a straight line."""
    return schedules.linear(peak=1.0, warmup=num_warmup_steps, total=max(num_training_steps, num_warmup_steps, 1))


def cosine(*, num_warmup_steps: int, num_training_steps: int, num_cycles: float, min_lr_rate: float = 0.0) -> Schedule:
    """Rise, then follow cosine waves: by default half a one, which falls."""
    fall = schedules.along(
        schedules.wave(float(num_cycles)),
        start=1.0,
        stop=float(min_lr_rate),
        steps=max(num_training_steps - num_warmup_steps, 1),
    )
    return _in_turn((_rise(schedules.straight, 0.0, num_warmup_steps), num_warmup_steps), (fall, None))


def cosine_with_restarts(*, num_warmup_steps: int, num_training_steps: int, num_cycles: int) -> Schedule:
    """Rise, then fall along half cosines, each from the peak."""
    total = max(num_training_steps, num_warmup_steps, 1)
    return schedules.cosine_with_restarts(peak=1.0, warmup=num_warmup_steps, total=total, cycles=num_cycles)


def polynomial(
    *, num_warmup_steps: int, num_training_steps: int, lr_end: float, power: float, lr_init: float
) -> Schedule:
    """Rise, then fall as a power of the rest."""
    total = max(num_training_steps, num_warmup_steps, 1)
    return schedules.polynomial(
        peak=1.0, warmup=num_warmup_steps, total=total, power=float(power), final=lr_end / lr_init
    )


def constant_with_warmup(*, num_warmup_steps: int) -> Schedule:
    """Rise, then stay."""
    return schedules.constant(1.0, warmup=num_warmup_steps)


def inverse_sqrt(*, num_warmup_steps: int, timescale: int) -> Schedule:
    """Rise, then fall as an inverse square root."""
    return schedules.inverse_sqrt(peak=1.0, warmup=num_warmup_steps, timescale=timescale)


def cosine_warmup_with_min_lr(
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float,
    min_lr_rate: float,
    warmup_lr_rate: float | None,
) -> Schedule:
    """Follow :func:`cosine` one step ahead; or rise from a share of the peak that is given."""
    following = schedules.ahead(
        cosine(
            num_warmup_steps=num_warmup_steps,
            num_training_steps=num_training_steps,
            num_cycles=num_cycles,
            min_lr_rate=min_lr_rate,
        ),
        steps=1,
    )
    if warmup_lr_rate is None:
        return following
    rise = _rise(schedules.straight, float(warmup_lr_rate), num_warmup_steps - 1)
    return _in_turn((rise, num_warmup_steps), (schedules.ahead(following, steps=num_warmup_steps), None))


def warmup_stable_decay(
    *,
    num_warmup_steps: int,
    num_stable_steps: int,
    num_decay_steps: int,
    warmup_type: str,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
) -> Schedule:
    """Rise, stay, fall; where there is no time for all of the fall, its beginning is left out."""
    curve = schedules.wave(float(num_cycles)) if decay_type == "cosine" else CURVES[decay_type]
    fall = schedules.along(curve, start=1.0, stop=float(min_lr_ratio), steps=max(num_decay_steps, 1))
    missing = max(0, -num_stable_steps)
    return _in_turn(
        (_rise(RISES[warmup_type], float(min_lr_ratio), num_warmup_steps), num_warmup_steps),
        (1.0, num_stable_steps),
        (schedules.ahead(fall, steps=missing), num_decay_steps - missing),
        (float(min_lr_ratio), None),
    )


def _rise(curve: Curve, first: float, steps: int) -> Schedule:
    return schedules.along(curve, start=first, stop=1.0, steps=max(steps, 1))


def _in_turn(*parts: tuple[Schedule | float, int | None]) -> Schedule:
    """Follow schedules for a number of steps each; those of no length are left out, and the last goes on."""
    kept = [(schedule, length) for schedule, length in parts if length is None or length > 0]
    boundaries = [sum(length or 0 for _, length in kept[: end + 1]) for end in range(len(kept) - 1)]
    return schedules.joined(*(schedule for schedule, _ in kept), boundaries=boundaries)
