"""Averages of the parameters over a run, kept beside them in the state."""

import math
from typing import Protocol

import attrs
import torch
from torch import Tensor

from forgather_fn import flat
from forgather_fn.describe import describe, described
from forgather_fn.finite import applied
from forgather_fn.flat import Flat
from forgather_fn.signature import checked


class AverageUpdate(Protocol):
    """Move an average towards the parameters."""

    def __call__(self, average: Flat, params: Flat, /, *, found_inf: Tensor, updates: Tensor) -> Flat:
        """Update ``average`` in place and give it.

        Where ``found_inf`` (a float32 scalar on the device) is 1 instead of 0, nothing must change, as in the update of
        an optimizer; ``updates`` counts those that were made, this one included.
        """
        ...


@attrs.frozen(repr=False)
class Average:
    """A state change: a running average of the parameters, for evaluation and export (``params="ema"``)."""

    update: AverageUpdate
    description: str = ""

    def __repr__(self) -> str:
        return self.description or f"Average({describe(self.update)})"


@checked
def ema(decay: float, *, warmup: bool = False) -> Average:
    """Keep an exponential moving average: after every update, ``ema = d * ema + (1 - d) * params``.

    It starts as a copy of the parameters, which a large decay keeps in it for long. With a warm-up the decay of the
    ``t``-th update is ``d = min(decay, (1 + t) / (10 + t))``, so that the average follows closely at first. Source: the
    ``num_updates`` of TensorFlow's ``ExponentialMovingAverage``.

    Args:
        decay: In [0, 1), by update: 0.999 averages over about 1000 of them.
        warmup: Whether it begins with smaller ones. Updates that are left out do not count.

    Raises:
        ValueError: ``decay`` is not in that range.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema: decay must be in [0, 1), got {decay}")

    def update(average: Flat, params: Flat, *, found_inf: Tensor, updates: Tensor) -> Flat:
        if not warmup:
            return _moved(average, params, 1 - decay, found_inf)
        t = updates.double()
        return _moved(average, params, 1.0 - ((1.0 + t) / (10.0 + t)).clamp(max=decay), found_inf)

    more = ", warmup=True" if warmup else ""  # so that older checkpoints, which have no such word, are the same plan
    return Average(update, f"ema(decay={decay!r}{more})")


@described
def power_ema(gamma: float) -> Average:
    """Keep an average whose memory grows with the run: at update ``t`` its decay is ``(1 - 1 / t) ** (gamma + 1)``.

    The profile is a power of the time, so that an average over the last share of the run stays one over that share.
    Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696,
    equation 127; a ``gamma`` of 6.94 has a relative width of 10 % of the run, 16.97 of 5 %.

    Args:
        gamma: At least 0. With 0 all updates have weights that are equal: the mean of the parameters so far.

    Raises:
        ValueError: ``gamma`` is negative or not finite.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"power_ema: gamma must be a finite number of at least 0, got {gamma}")

    def update(average: Flat, params: Flat, *, found_inf: Tensor, updates: Tensor) -> Flat:
        beta = (1.0 - 1.0 / updates.clamp(min=1).double()) ** (gamma + 1.0)
        return _moved(average, params, 1.0 - beta, found_inf)

    return Average(update)


@described
def swa(*, start: int, every: int = 1) -> Average:
    """Average weights stochastically: keep the plain mean of the parameters after some updates.

    Those are ``start``, ``start + every``, ...; before the first of them it is the parameters. Equal to
    ``torch.optim.swa_utils.AveragedModel``, updated at these updates. What batch norms know of their inputs is of the
    trained parameters, not of the mean: :func:`~forgather_fn.statistics.refreshed_statistics` measures it anew.

    Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv 1803.05407.

    Args:
        start: The first update that counts, from 1; those that are left out because they are not finite do not count.
        every: Updates between those that count.

    Raises:
        ValueError: A number is less than 1.
    """
    if not (isinstance(start, int) and isinstance(every, int) and start >= 1 and every >= 1):
        raise ValueError(f"swa: start and every must be integers of at least 1, got start={start} and every={every}")

    def update(average: Flat, params: Flat, *, found_inf: Tensor, updates: Tensor) -> Flat:
        since = updates - start
        counts = torch.div(since, every, rounding_mode="floor") + 1  # of parameters in the mean, these included
        due = (torch.remainder(since, every) == 0) | (since < 0)
        share = torch.where(due, 1.0 / counts.clamp(min=1).double(), 0.0)
        return _moved(average, params, share, found_inf)

    return Average(update)


def begun(params: Flat) -> Flat:
    """Begin an average: a copy of the parameters, in at least float32.

    In half precision an average would stand still: a step towards the parameters that is smaller than the distance to
    the next number is none.
    """
    wide = params.layout.widened()
    if wide is params.layout:
        return params.copy()
    average = flat.zeros(wide, params.buffers[0].device)
    average.assign(params)
    return average


def narrowed(average: Flat, params: Flat) -> Flat:
    """Give an average in the data types of the parameters: itself, where it has them."""
    if average.layout.dtypes == params.layout.dtypes:
        return average
    found = flat.zeros(params.layout, params.buffers[0].device)
    found.assign(average)
    return found


def _moved(average: Flat, params: Flat, share: Tensor | float, found_inf: Tensor) -> Flat:
    """Move every element of an average by a share of the way to the parameters, in place, unless the flag is set."""
    good = applied(found_inf)
    share = share * (good.double() if isinstance(good, Tensor) else good)
    for mine, current in zip(average.buffers, params.buffers, strict=True):
        if mine.is_floating_point():
            mine.lerp_(current.to(mine.dtype), share if isinstance(share, float) else share.to(mine.dtype))
    return average
