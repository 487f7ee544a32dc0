"""Adam and AdamW: torch's own fused kernels over flat storage."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.finite import applied
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Group, Predicate, assigner, matrices, named, schedules_of
from forgather_fn.optim import unfused
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext, check_betas
from forgather_fn.optim.kernel_calls import kernel_calls
from forgather_fn.schedules import Schedule


def _adam_family(
    kernel: Callable[..., None],
    decoupled: bool,
    betas: tuple[float | Schedule, float | Schedule],
    eps: float,
    weight_decay: float | Schedule,
    decays: Predicate,
    groups: Sequence[Group],
) -> Optimizer:
    """Make an optimizer of one of the fused kernels that ``torch.optim.Adam`` and ``AdamW`` call.

    Updates are counted by parameter, since one without a gradient is not updated; as in torch, the bias of its
    averages is corrected by its own count.
    """
    numbers = named("beta1", betas[0]), named("beta2", betas[1])

    def init(params: Flat) -> OptState:
        count = torch.zeros(len(params), dtype=torch.float32, device=params.buffers[0].device)
        return {"exp_avg": params.map(torch.zeros_like), "exp_avg_sq": params.map(torch.zeros_like), "count": count}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        gradients, found_inf = gradients.for_kernel(), context.found_inf
        count = state["count"]
        beta1, beta2 = context.valued(numbers[0]), context.valued(numbers[1])
        if torch.compiler.is_compiling():
            _count_up(count, gradients.active, applied(found_inf))
            unfused.adam(
                gradients,
                params,
                state["exp_avg"],
                state["exp_avg_sq"],
                count,
                decoupled=decoupled,
                betas=(beta1, beta2),
                eps=eps,
                context=context,
            )
            return state
        slots = state["exp_avg"], state["exp_avg_sq"]
        together = _counted_alike(gradients, params, count)
        calls = kernel_calls(gradients, params, *slots, together=together, count=count)
        if not together and sum(len(call.chunks) for call in calls) == 1:  # as in a backward pass that updates
            calls[0].counts[0].add_(applied(found_inf))
        else:
            _count_up(count, gradients.active, applied(found_inf))
        for call in calls:
            rate, decay = context.rates_of(call.hyper)
            kernel(
                call.params,
                gradients.slices(call.chunks),
                call.slots[0],
                call.slots[1],
                [],
                call.counts,
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=gradients.divisor,
                found_inf=found_inf,
            )
        return state

    schedules = schedules_of(groups, weight_decay=weight_decay, beta1=betas[0], beta2=betas[1])
    return Optimizer(
        init, update, assigner(groups, weight_decay, decays), separable=True, elementwise=True, schedules=schedules
    )


def _count_up(count: Tensor, active: tuple[bool, ...], by: Tensor | float) -> None:
    count.add_(by if all(active) else torch.tensor(active, dtype=count.dtype, device=count.device) * by)


def _counted_alike(gradients: Gradients, params: Flat, count: Tensor) -> bool:
    """Tell whether all active parameters have been updated equally often, so that they may share a count.

    That holds as long as the same ones get a gradient at every update. Storage that is new here (a first step, a copy,
    a restored state) is asked once; that waits for the device. Where each gradient has storage of its own, nothing is
    updated together, and nobody asks.
    """
    if gradients.flat is None:
        params.kept.pop("counted", None)
        return False
    known = params.kept.get("counted")
    if known is None or known[0] is not count:
        counts = list(itertools.compress(count.tolist(), gradients.active))
        known = (count, gradients.active if len(set(counts)) <= 1 else None)
    elif known[1] != gradients.active:
        known = (count, None)
    params.kept["counted"] = known
    return known[1] is not None


@described
def adamw(
    *,
    betas: tuple[float | Schedule, float | Schedule] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Schedule = 0.01,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Adam with decoupled weight decay: torch's own fused kernel over flat storage.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; equal to ``torch.optim.AdamW``.

    Args:
        betas: Decay of the running mean and of the running mean square, by update; numbers or schedules.
        eps: Added to the root of the mean square.
        weight_decay: Of those parameters that decay; a number or a schedule.
        decays: Which parameters those are; by default, those of two or more dimensions.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: ``betas`` are not in [0, 1), or ``eps`` is negative.
    """
    check_betas("adamw", betas, eps)
    return _adam_family(torch._fused_adamw_, True, betas, eps, weight_decay, decays, groups)


@described
def adam(
    *,
    betas: tuple[float | Schedule, float | Schedule] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Schedule = 0.0,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Adam; weight decay, if any, is added to the gradient.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015; equal to ``torch.optim.Adam``.
    The arguments are those of :func:`adamw`.
    """
    check_betas("adam", betas, eps)
    return _adam_family(torch._fused_adam_, False, betas, eps, weight_decay, decays, groups)
