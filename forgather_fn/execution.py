"""How the steps of a program are run: the three functions that every way of running them gives."""

from collections.abc import Mapping
from typing import Protocol

import attrs

from forgather_fn.data import Batch
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients, Spread
from forgather_fn.mean import Mean
from forgather_fn.program import Metrics
from forgather_fn.state import TrainState


class RunPasses(Protocol):
    """Run forward and backward over the microbatches of a batch; leave the state as it is, also on failure."""

    def __call__(self, state: TrainState, batch: Batch, /) -> tuple[Gradients, Flat, dict[str, Mean]]:
        """Give the mean gradient, the buffers that forward passes leave, and the means of the loss."""
        ...


class Advance(Protocol):
    """Apply a gradient to a state, which is consumed when the optimizer begins."""

    def __call__(
        self,
        state: TrainState,
        gradients: Gradients,
        buffers: Flat | None,
        means: Mapping[str, Mean],
        wants: frozenset[str],
        /,
    ) -> tuple[TrainState, Metrics]:
        """Give the next state, and the metrics of the step."""
        ...


class TakeStep(Protocol):
    """Do both."""

    def __call__(self, state: TrainState, batch: Batch, wants: frozenset[str], /) -> tuple[TrainState, Metrics]:
        """Give the next state, and the metrics of the step."""
        ...


@attrs.frozen(eq=False)
class Execution:
    """How the steps of a program are run: as they stand, or compiled.

    Attributes:
        step: The whole step.
        gradients: Its first half.
        advance: Its second half.
        spread: How gradients that somebody else has taken are spread over processes; None where each has all of them.
    """

    step: TakeStep
    gradients: RunPasses
    advance: Advance
    spread: Spread | None = None
