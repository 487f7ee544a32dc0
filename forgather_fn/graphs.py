"""The step as functions of tensors, for a compiler to trace whole.

Two kinds of code meet in them. The model and the loss are the user's: they are read by the compiler, so that what they
ask of the world (modes, attributes, shapes) is guarded, and what cannot be in a graph is told by file and line. The
rest is ours, or pure by contract (transforms, optimizers): it is *opaque*, run once on symbolic tensors as it stands,
so that nothing of it has to be checked again at each step.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from forgather_fn import tree
from forgather_fn.built import Built
from forgather_fn.finite import flag_on_device
from forgather_fn.flat import Flat, Layout, Leaf, memory_order, shaped
from forgather_fn.gradient import Gradients
from forgather_fn.losses import named_means
from forgather_fn.mean import Mean
from forgather_fn.optim.base import Rates
from forgather_fn.state import Arrays
from forgather_fn.step import update_arrays
from forgather_fn.wide import wide

Sums = dict[str, tuple[Tensor, Tensor]]
"""Means as a graph gives them: total and weight, by name."""

F = TypeVar("F", bound=Callable[..., Any])


class Opaque(Protocol):
    """Mark a function that the compiler runs on symbols instead of reading its code."""

    def __call__(self, function: F, /) -> F:
        """Give it back, marked."""
        ...


Gradient = list[Tensor] | dict[str, Tensor]
"""Flat buffers, or one tensor for each leaf that has a gradient."""

Active = tuple[bool, ...]
"""Which leaves of the parameters a gradient has."""


class Differentiate(Protocol):
    """Run forward and backward on one microbatch."""

    def __call__(
        self,
        params: list[Tensor],
        frozen: dict[str, Tensor],
        buffers: list[Tensor],
        part: Any,
        share: Tensor | None,
        scale: list[Tensor],
        /,
    ) -> tuple[list[Tensor], Active, list[Tensor], Sums]:
        """Give the gradients that there are, of which leaves; the buffers as the forward pass leaves them; the sums.

        ``share`` is what the objective is multiplied by before it is differentiated; None for the inverse of its own
        weight. ``scale`` is none or one scalar that it is multiplied by as well.
        """
        ...


class UpdateTensors(Protocol):
    """Update the tensors of a state in place."""

    def __call__(
        self,
        tensors: list[Tensor],
        gradient: Gradient,
        active: Active,
        buffers: list[Tensor],
        sums: Sums,
        weight: Tensor,
        divisor: list[Tensor],
        learning_rate: Tensor,
        scheduled: dict[str, Tensor],
        step: Tensor,
        seed: Tensor,
        /,
    ) -> dict[str, Tensor]:
        """Give what is reported, and under :data:`FLAG` whether the step stopped the run.

        ``divisor`` is the scalars that the gradient is to be divided by, ``scheduled`` the values of the optimizer's
        own schedules.
        """
        ...


FLAG = "stopped"


def differentiation(built: Built, buffers: Layout, opaque: Opaque) -> Differentiate:
    """Make the function of a microbatch's gradient.

    Args:
        built: The model.
        buffers: The layout of the model's buffers.
        opaque: Marks what the compiler runs instead of reading it.
    """
    binding, plan, module, layout = built.binding, built.plan, built.module, built.binding.layout
    buffer_names = tuple(binding.buffer_places(buffers.index))
    lowered, device_type = built.lowered, plan.device.type

    @opaque
    def leaves(params: list[Tensor]) -> list[Tensor]:
        return list(views(layout, params).values())

    @opaque
    def named(inputs: list[Tensor], frozen: dict[str, Tensor], held: list[Tensor]) -> dict[str, Tensor]:
        return binding.placed(dict(zip(layout.index, inputs, strict=True)), frozen, views(buffers, held), buffers)

    def differentiate(
        params: list[Tensor],
        frozen: dict[str, Tensor],
        held: list[Tensor],
        part: Any,
        share: Tensor | None,
        scale: list[Tensor],
    ) -> tuple[list[Tensor], Active, list[Tensor], Sums]:
        inputs = [leaf.detach().requires_grad_() for leaf in leaves(params)]
        fresh = [buffer.clone() for buffer in held]
        tensors = named(inputs, frozen, fresh)
        given = dict(tensors)
        args, kwargs = built.arguments(part)
        with torch.autocast(device_type, dtype=lowered or torch.bfloat16, enabled=lowered is not None):
            outputs = torch.func.functional_call(module, given, tuple(args), kwargs, tie_weights=False)
            means = named_means(plan.loss(outputs, part))
        for name in buffer_names:
            if given[name] is not tensors[name]:  # reassigned, not written to
                tensors[name].copy_(given[name])
        objective = means["loss"]
        if share is None:
            share = one_over(pair(objective)[1])
        total = objective.total
        if scale:
            total = wide(total)  # no half precision holds the scale
            share = share * scale[0]
        found = torch.autograd.grad(total, inputs, grad_outputs=share.to(total), allow_unused=True)
        active = tuple([gradient is not None for gradient in found])
        present = [gradient for gradient in found if gradient is not None]
        return present, active, fresh, {name: pair(mean) for name, mean in means.items()}

    return differentiate


def updating(built: Built, like: Mapping[str, Any], wants: frozenset[str]) -> UpdateTensors:
    """Make the function of an update.

    Args:
        built: The plan.
        like: The tree that the tensors of a state are the leaves of.
        wants: Metrics beyond the usual ones.
    """
    layout = built.binding.layout

    def update(
        tensors: list[Tensor],
        gradient: Gradient,
        active: Active,
        buffers: list[Tensor],
        sums: Sums,
        weight: Tensor,
        divisor: list[Tensor],
        learning_rate: Tensor,
        scheduled: dict[str, Tensor],
        step: Tensor,
        seed: Tensor,
    ) -> dict[str, Tensor]:
        arrays = Arrays(frozen={}, **tree.filled(like, tensors))
        held: Mapping[str, Tensor] = gradient if isinstance(gradient, dict) else Flat(layout, tuple(gradient))
        views = {name: held[name] for name in itertools.compress(layout.index, active)}
        following, reports, stopped = update_arrays(
            built.plan,
            arrays,
            Gradients(
                layout,
                active,
                views,
                held if isinstance(held, Flat) else None,
                0,
                weight,
                product(divisor),
            ),
            Flat(arrays.buffers.layout, tuple(buffers)) if buffers else None,
            {name: Mean(*pair) for name, pair in sums.items()},
            flag=flag_on_device,
            begin=lambda: None,
            rates=Rates(learning_rate, scheduled),
            step=step,
            seed=seed,
            wants=wants,
        )
        for old, new in zip(tensors, tree.tensors(following.changing()), strict=True):
            if new is not old:
                old.copy_(new)
        return {**reports, FLAG: stopped}

    return update


def concatenated(layout: Layout, tensors: list[Tensor], active: Active) -> list[Tensor]:
    """Make flat buffers of the tensors of those leaves that are active, and of zeros."""
    given = dict(zip(itertools.compress(layout.index, active), tensors, strict=True))
    return [
        torch.cat([_piece(leaf, given.get(leaf.name), dtype, tensors[0].device) for leaf in _of_buffer(layout, number)])
        for number, dtype in enumerate(layout.dtypes)
    ]


def _piece(leaf: Leaf, tensor: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    if tensor is None:
        return torch.zeros(leaf.extent, dtype=dtype, device=device)
    line = tensor.permute(memory_order(leaf)).reshape(-1)
    return line if line.numel() == leaf.extent else torch.nn.functional.pad(line, (0, leaf.extent - line.numel()))


def views(layout: Layout, buffers: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name the views of flat buffers, as a compiler understands them best: by splitting them, not by strides."""
    found: dict[str, Tensor] = {}
    for number, buffer in enumerate(buffers):
        own = _of_buffer(layout, number)
        for leaf, piece in zip(own, torch.split(buffer, [leaf.extent for leaf in own]), strict=True):
            found[leaf.name] = shaped(leaf, piece)
    return {name: found[name] for name in layout.index}


def _of_buffer(layout: Layout, number: int) -> list[Leaf]:
    return sorted((leaf for leaf in layout.leaves if leaf.buffer == number), key=lambda leaf: leaf.offset)


def accumulate(layout: Layout, total: list[Tensor], gradient: list[Tensor], active: Active) -> list[Tensor]:
    """Add the gradient of a microbatch to flat buffers, in place."""
    for held, new in zip(total, concatenated(layout, gradient, active), strict=True):
        held.add_(new)
    return total


def product(scalars: list[Tensor]) -> Tensor | None:
    """Multiply scalars; None where there are none."""
    return functools.reduce(operator.mul, scalars) if scalars else None


def pair(mean: Mean) -> tuple[Tensor, Tensor]:
    """Give total and weight as tensors, out of reach of the backward pass."""
    total, weight = mean.detach().total, mean.weight
    if isinstance(weight, Tensor):
        return total, weight.detach()
    return total, torch.scalar_tensor(weight, dtype=total.dtype, device=total.device)


def one_over(weight: Tensor) -> Tensor:
    """Divide one by a weight, in the type of the objective; zero where there is nothing to weigh."""
    exact = weight if weight.is_floating_point() else weight.double()
    return exact.reciprocal().nan_to_num(posinf=0.0)
