"""What must hold of a step before it is compiled: each is checked once, and refused with what to do instead."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn import tree
from forgather_fn.built import Built
from forgather_fn.data import Batch
from forgather_fn.losses import leading_dimension
from forgather_fn.model import surrounded
from forgather_fn.random import generators
from forgather_fn.state import TrainState
from forgather_fn.step import take_gradients


def check_tensors(like: Mapping[str, Any]) -> None:
    """Make sure that all that a step changes is tensors: a number would stay in a graph as it was when it was made."""
    for path, leaf in tree.walk({name: like[name] for name in ("opt", "transforms")}):
        if not isinstance(leaf, Tensor | None):
            raise ValueError(
                f"{path} is {leaf!r}, which a compiled step cannot change: an optimizer or a transform keeps tensors, "
                "torch.tensor(0) for a number"
            )


def check_hooks(built: Built) -> None:
    """Make sure that no parameter has a hook: in a graph, gradients are not those of the module's own parameters."""
    for site, name in built.binding.trainable:
        if site.tensor._backward_hooks or getattr(site.tensor, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a gradient hook, which a compiled step would not call; write it as a transform "
                '(ff.stateless(function)), or use compile="model" or compile=False'
            )


def try_once(built: Built, state: TrainState, part: Any) -> None:
    """Run forward and backward once as they stand.

    What is wrong with a model, a loss or a batch is then said in its own words, not in the compiler's.

    Raises:
        ValueError: Microbatches are to be one graph, and the model draws random numbers.
    """
    drawn: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = [generator.get_state() for generator in generators(built.device)]
        with surrounded(built.module, built.plan.loss):
            outputs = built.module(*args, **kwargs)
        after = [generator.get_state() for generator in generators(built.device)]
        drawn.append(any(not torch.equal(*pair) for pair in zip(before, after, strict=True)))
        return outputs

    once = attrs.evolve(built, call=watched, plan=attrs.evolve(built.plan, microbatches=1, unroll=False))
    _, buffers, _ = take_gradients(once, state, Batch(part, leading_dimension(part), None))
    built.workspace.clear()
    if buffers.layout.leaves != state.read().buffers.layout.leaves:
        raise ValueError(
            f"{type(built.module).__name__}.forward makes or reshapes buffers, which a compiled step cannot; give them "
            'their shape in __init__, or use compile="model" or compile=False'
        )
    if built.plan.unroll and any(drawn):
        raise ValueError(
            "Plan: unroll=True, but the model draws random numbers, and microbatches of one graph cannot have keys of "
            "their own; leave unroll out, or turn dropout off"
        )
