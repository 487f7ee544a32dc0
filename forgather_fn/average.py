"""Averages of the parameters over a run, kept beside them in the state."""

from typing import Protocol

import attrs
from torch import Tensor

from forgather_fn.describe import describe, described
from forgather_fn.flat import Flat


class AverageUpdate(Protocol):
    """Move an average towards the parameters."""

    def __call__(self, average: Flat, params: Flat, /, *, good: Tensor | float, updates: Tensor) -> Flat:
        """Update ``average`` in place and give it.

        ``good`` is 1, or 0 where the step was not finite and nothing must change; ``updates`` counts
        the updates so far, this one included.
        """
        ...


@attrs.frozen(repr=False)
class Average:
    """A state change: a running average of the parameters, for evaluation and export (``params="ema"``)."""

    update: AverageUpdate
    description: str = ""

    def __repr__(self) -> str:
        return self.description or f"Average({describe(self.update)})"


@described
def ema(decay: float) -> Average:
    """Keep an exponential moving average: after every update, ``ema = decay * ema + (1 - decay) * params``.

    It starts as a copy of the parameters.

    Args:
        decay: In [0, 1), by update: 0.999 averages over about 1000 of them.

    Raises:
        ValueError: ``decay`` is not in that range.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema: decay must be in [0, 1), got {decay}")

    def update(average: Flat, params: Flat, *, good: Tensor | float, updates: Tensor) -> Flat:
        del updates
        share = good * (1 - decay) if isinstance(good, float) else good.double() * (1 - decay)
        for mine, current in zip(average.buffers, params.buffers, strict=True):
            if mine.is_floating_point():
                mine.lerp_(current, share if isinstance(share, float) else share.to(mine.dtype))
        return average

    return Average(update)
