"""Stochastic gradient descent."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from forgather_fn.describe import described
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Group, Predicate, assigner, matrices, named, schedules_of
from forgather_fn.optim import unfused
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext
from forgather_fn.optim.kernel_calls import kernel_calls
from forgather_fn.schedules import Schedule


@described
def sgd(
    *,
    momentum: float | Schedule = 0.0,
    nesterov: bool = False,
    weight_decay: float | Schedule = 0.0,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Stochastic gradient descent, with momentum if asked for: equal to ``torch.optim.SGD``.

    Args:
        momentum: Decay of the running sum of gradients, or a schedule of it; the number 0 keeps none.
        nesterov: Look ahead along the momentum.
        weight_decay: Added to the gradient, times the parameter, for those parameters that decay; or a schedule of it.
        decays: Which parameters those are; by default, those of two or more dimensions.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: ``momentum`` is negative, or ``nesterov`` without it.
    """
    if not callable(momentum) and (not 0 <= momentum < math.inf or (nesterov and momentum == 0)):
        raise ValueError(f"sgd: momentum must be at least 0, and above 0 for nesterov; got {momentum}")
    keeps, number = momentum != 0, named("momentum", momentum)

    def init(params: Flat) -> OptState:
        return {"momentum": params.map(torch.zeros_like)} if keeps else {}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        gradients = gradients.for_kernel()
        slots = [state["momentum"]] if keeps else []
        kept = context.valued(number)
        if torch.compiler.is_compiling():
            unfused.sgd(gradients, params, *slots, momentum=kept, nesterov=nesterov, context=context)
            return state
        for call in kernel_calls(gradients, params, *slots):
            rate, decay = context.rates_of(call.hyper)
            kernel: Callable[..., None] = torch._fused_sgd_ if _fused_sgd_is_right(call.params[0]) else _unfused_sgd
            kernel(
                call.params,
                gradients.slices(call.chunks),
                call.slots[0] if keeps else [],
                weight_decay=decay,
                momentum=kept,
                lr=rate,
                dampening=0.0,
                nesterov=nesterov,
                maximize=False,
                is_first_step=False,
                grad_scale=gradients.divisor,
                found_inf=context.found_inf,
            )
        return state

    schedules = schedules_of(groups, weight_decay=weight_decay, momentum=momentum)
    return Optimizer(
        init, update, assigner(groups, weight_decay, decays), separable=True, elementwise=True, schedules=schedules
    )


def _fused_sgd_is_right(tensor: Tensor) -> bool:
    """Tell where torch's fused kernel may be used: on CPUs its results in bfloat16 are wrong (seen in torch 2.13)."""
    return tensor.device.type != "cpu" or tensor.dtype.itemsize > 2


def _unfused_sgd(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor,
    is_first_step: bool,
    **options: Any,
) -> None:
    """Do what the fused kernel is for, on a CPU, where looking at the flag costs nothing."""
    assert not is_first_step
    if found_inf.item():
        return
    if grad_scale is not None:
        torch._foreach_div_(list(gradients), grad_scale)
    momentum_list: list[Tensor | None] = [*momenta] or [None] * len(params)
    torch_sgd(list(params), list(gradients), momentum_list, foreach=True, **options)
