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
        compiling = torch.compiler.is_compiling()
        together = not compiling and _counted_alike(gradients, params, count)
        if all(gradients.active):
            count.add_(applied(found_inf))
        else:
            active = torch.tensor(gradients.active, dtype=count.dtype, device=count.device)
            count.add_(active * applied(found_inf))
        if compiling:
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
        counts = _unbound(params, count)
        for call in kernel_calls(gradients, params, state["exp_avg"], state["exp_avg_sq"], together=together):
            kernel(
                call.params,
                gradients.slices(call.chunks),
                call.slots[0],
                call.slots[1],
                [],
                [counts[chunk.first] for chunk in call.chunks],
                lr=context.learning_rate * context.valued(call.hyper.learning_rate),
                beta1=beta1,
                beta2=beta2,
                weight_decay=context.valued(call.hyper.weight_decay or 0.0),
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


def _counted_alike(gradients: Gradients, params: Flat, count: Tensor) -> bool:
    """Tell whether all active parameters have been updated equally often, so that they may share a count.

    That holds as long as the same ones get a gradient at every update. Storage that is new here (a first step, a copy,
    a restored state) is asked once; that waits for the device.
    """
    known = params.kept.get("counted")
    if known is None or known[0] is not count:
        counts = list(itertools.compress(count.tolist(), gradients.active))
        known = (count, gradients.active if len(set(counts)) <= 1 else None)
    elif known[1] != gradients.active:
        known = (count, None)
    params.kept["counted"] = known
    return known[1] is not None


def _unbound(params: Flat, count: Tensor) -> Sequence[Tensor]:
    found = params.kept.get("counts")
    if found is None or found[0] is not count:
        found = params.kept["counts"] = (count, count.unbind())
    counts: Sequence[Tensor] = found[1]
    return counts


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
