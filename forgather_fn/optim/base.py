"""The contract of optimizers: pairs of pure functions."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import attrs
from torch import Tensor

from forgather_fn import flat as flat_storage
from forgather_fn.describe import describe
from forgather_fn.flat import Flat, Hyper
from forgather_fn.gradient import Gradients

OptState = Mapping[str, Any]


class OptimizerInit(Protocol):
    """Make the optimizer's state for these parameters."""

    def __call__(self, params: Flat, /) -> OptState:
        """Give slots by name: mappings in the layout of the parameters, tensors, numbers."""
        ...


class OptimizerUpdate(Protocol):
    """Apply one update."""

    def __call__(
        self,
        gradients: Gradients,
        state: OptState,
        params: Flat,
        /,
        *,
        learning_rate: float | Tensor,
        found_inf: Tensor,
    ) -> OptState:
        """Update ``params`` and the slots of ``state`` in place (they are donated), and give the new state.

        Where ``found_inf`` (a float32 scalar on the device) is 1 instead of 0, nothing must change. ``gradients`` may
        be used up. Parameters that it has no entry for are left untouched, their slots too.
        """
        ...


@attrs.frozen(repr=False)
class Optimizer:
    """What turns gradients into new parameters.

    Attributes:
        init: ``params -> state``.
        update: ``(gradients, state, params) -> state``, in place on what it is given. Those that need shapes read
            ``params[name]``; those that work element by element, :func:`~forgather_fn.optim.parts.parts`.
        groups: Name each parameter's hyperparameters: ``{name: tensor} -> {name: Hyper}``.
        description: How it prints.
        compiles: Whether ``update`` is tensor operations alone, so that it can be part of a graph; its learning rate is
            a scalar tensor there.
        separable: Whether updating parameter by parameter, in any order, is the same as updating all at once.
        elementwise: Whether every element is updated by itself, so that a process may have shards of parameters only.
    """

    init: OptimizerInit
    update: OptimizerUpdate
    groups: Callable[[Mapping[str, Tensor]], Mapping[str, Hyper]]
    description: str = ""
    compiles: bool = True
    separable: bool = False
    elementwise: bool = False

    def __repr__(self) -> str:
        return self.description or f"Optimizer({describe(self.update)})"


def slots_like(params: Flat) -> Flat:
    """Make a slot of zeros in the layout of the parameters, for optimizers of your own."""
    return flat_storage.zeros(params.layout, params.buffers[0].device)
