"""AdamW whose state is in bfloat16."""

from collections.abc import Sequence

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.finite import BAD, applied
from forgather_fn.flat import Flat, layout_of, zeros
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Group, Predicate, assigner, matrices, named, schedules_of
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext, check_betas
from forgather_fn.optim.rounding import bfloat16_bits, chances, drawn, salt_of
from forgather_fn.optim.rows import like
from forgather_fn.optim.shaped import one_by_one, take
from forgather_fn.schedules import Schedule


@described
def adamw_bfloat16(
    *,
    betas: tuple[float | Schedule, float | Schedule] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Schedule = 0.01,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """AdamW with both running means in bfloat16, rounded by chance: half the memory of the state.

    Rounded to the nearest, a mean that moves by less than 1/256 of itself a step (as the second one does) would stand
    still. Rounded by chance, it is right on average. Parameters in bfloat16 are rounded by chance as well, and need no
    master copy. The chance derives from the run's seed, the step, and the names: a run repeats to the bit.

    Source: the update is that of :func:`~forgather_fn.optim.adam.adamw`; the rounding as in Zamirai et al., "Revisiting
    BFloat16 Training", arXiv 2010.06192.

    Args:
        betas: Decay of the running mean and of the running mean square, by update; numbers or schedules.
        eps: Added to the root of the mean square.
        weight_decay: Of those parameters that decay; a number or a schedule.
        decays: Which parameters those are; by default, those of two or more dimensions.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: ``betas`` are not in [0, 1), or ``eps`` is negative.
    """
    check_betas("adamw_bfloat16", betas, eps)
    numbers = named("beta1", betas[0]), named("beta2", betas[1])

    def init(params: Flat) -> OptState:
        count = torch.zeros(len(params), dtype=torch.float32, device=params.buffers[0].device)
        slots = {slot: _slots(params) for slot in ("exp_avg", "exp_avg_sq")}
        return {**slots, "count": count}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        beta1, beta2 = context.valued(numbers[0]), context.valued(numbers[1])
        found_inf = context.found_inf
        if found_inf is BAD:
            return state
        active = torch.tensor(gradients.active, dtype=torch.float32, device=state["count"].device)
        state["count"].add_(active * applied(found_inf))
        counts = state["count"].double().unbind()
        for own in one_by_one(gradients, params, context):
            bits = drawn(
                torch.arange(own.value.numel(), device=own.value.device).view(own.value.shape),
                context.step,
                context.seed,
            )
            mean, square = (state[slot][own.name].to(own.value.dtype) for slot in ("exp_avg", "exp_avg_sq"))
            mean = mean + (own.gradient - mean) * like(mean, 1 - beta1)
            square = square * like(square, beta2) + own.gradient * own.gradient * like(square, 1 - beta2)
            remaining1, remaining2 = (1 - beta ** counts[own.number] for beta in (beta1, beta2))
            root = square.sqrt() / like(square, remaining2.sqrt()) + eps
            value = own.value * like(own.value, 1 - own.rate * own.decay)
            value = value - like(value, own.rate / remaining1) * mean / root
            for slot, held, new in (
                ("exp_avg", state["exp_avg"][own.name], mean),
                ("exp_avg_sq", state["exp_avg_sq"][own.name], square),
                ("params", own.param, value),
            ):
                take(held, _rounded(held, new, bits, f"{slot}/{own.name}"), found_inf)
        return state

    schedules = schedules_of(groups, weight_decay=weight_decay, beta1=betas[0], beta2=betas[1])
    return Optimizer(init, update, assigner(groups, weight_decay, decays), separable=True, schedules=schedules)


def _slots(params: Flat) -> Flat:
    halves = {leaf.name: torch.empty(leaf.shape, dtype=torch.bfloat16, device="meta") for leaf in params.layout.leaves}
    return zeros(layout_of(halves), params.buffers[0].device)


def _rounded(held: Tensor, new: Tensor, bits: Tensor, name: str) -> Tensor:
    """Round by chance what is held in bfloat16."""
    if held.dtype != torch.bfloat16:
        return new
    return bfloat16_bits(new.float(), chances(bits, salt_of(name)))
