"""Schedule-free AdamW: an average of the iterates in place of a falling learning rate."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.finite import applied
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Group, Predicate, assigner, matrices, named, schedules_of
from forgather_fn.hyper import Scalar
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext, check_betas, slots_like
from forgather_fn.optim.elementwise import updated
from forgather_fn.optim.rows import like
from forgather_fn.schedules import Schedule


@described
def schedule_free_adamw(
    *,
    betas: tuple[float, float | Schedule] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Schedule = 0.0,
    power: float = 0.0,
    rate_power: float = 2.0,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """AdamW whose iterates are averaged, so that the learning rate need not fall; only warm it up.

    There are three points: gradients are taken at ``y``, which the parameters of a state are; steps are made from
    ``z``, a slot; their average ``x`` is what is evaluated and exported, and is computed of the two when asked for. Use
    a schedule that rises and stays: ``ff.schedules.constant(1e-3, warmup=100)``.

    Source: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682; equal to ``schedulefree.AdamWScheduleFree``.

    Args:
        betas: How far ``y`` lies from ``z`` towards ``x``, a number; and the decay of the running mean square, a number
            or a schedule.
        eps: Added to the root of the mean square.
        weight_decay: At ``y``, of those parameters that decay; a number or a schedule.
        power: The weight of an iterate in the average grows as its number to this power.
        rate_power: It grows as the largest learning rate so far to this one; factors of groups do not count.
        decays: Which parameters decay; by default, those of two or more dimensions.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: ``betas`` are not in [0, 1), the first is 0 or a schedule, or a power is negative.
    """
    check_betas("schedule_free_adamw", betas, eps)
    first = betas[0]
    if callable(first) or first == 0:
        raise ValueError(
            f"schedule_free_adamw: the first of betas says where the evaluated point lies, and must be a number in "
            f"(0, 1); got {betas}"
        )
    if not (0 <= power < math.inf and 0 <= rate_power < math.inf):
        raise ValueError(f"schedule_free_adamw: powers must be at least 0; got {power} and {rate_power}")
    number = named("beta2", betas[1])

    def init(params: Flat) -> OptState:
        device = params.buffers[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        count, total, highest = (torch.zeros((), dtype=dtype, device=device) for _ in range(3))
        slots = {"z": params.copy(), "exp_avg_sq": slots_like(params)}
        return {**slots, "count": count, "weight_sum": total, "highest_rate": highest}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        beta2, good = context.valued(number), like(state["count"], applied(context.found_inf))
        state["count"].add_(good)
        state["highest_rate"].clamp_(min=context.learning_rate * good)
        weight = state["count"] ** power * state["highest_rate"] ** rate_power
        state["weight_sum"].add_(weight * good)
        share = torch.where(state["weight_sum"] > 0, weight / state["weight_sum"], 0.0)
        remaining = 1 - beta2 ** state["count"]

        def rule(
            param: Tensor, gradient: Tensor, slots: Sequence[Tensor], rate: Scalar, decay: Scalar
        ) -> tuple[Tensor, Tensor, Tensor]:
            z, square = slots
            square = square * like(square, beta2) + gradient * gradient * like(square, 1 - beta2)
            direction = gradient / ((square / like(square, remaining)).sqrt() + eps) + param * like(param, decay)
            y = param + (z - param) * like(param, share)
            y = y + direction * like(param, rate * (first * (1 - share) - 1))
            return y, z - direction * like(param, rate), square

        updated(rule, gradients, params, state["z"], state["exp_avg_sq"], context=context)
        return state

    def evaluated(state: OptState, params: Flat) -> Flat:
        pairs = zip(params.buffers, state["z"].buffers, strict=True)
        return Flat(params.layout, tuple(torch.lerp(y, z, 1 - 1 / first) for y, z in pairs))

    return Optimizer(
        init,
        update,
        assigner(groups, weight_decay, decays),
        elementwise=True,
        schedules=schedules_of(groups, weight_decay=weight_decay, beta2=betas[1]),
        evaluated=evaluated,
    )
