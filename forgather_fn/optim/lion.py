"""Lion: the sign of an interpolated momentum."""

from collections.abc import Sequence

from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Group, Predicate, assigner, matrices, named, schedules_of
from forgather_fn.hyper import Scalar
from forgather_fn.optim.base import Optimizer, OptState, UpdateContext, check_betas, slots_like
from forgather_fn.optim.elementwise import updated
from forgather_fn.optim.rows import like
from forgather_fn.schedules import Schedule


@described
def lion(
    *,
    betas: tuple[float | Schedule, float | Schedule] = (0.9, 0.99),
    weight_decay: float | Schedule = 0.0,
    decays: Predicate = matrices,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Follow the sign of an interpolation between momentum and gradient: one slot, and steps of one size.

    Its updates are larger than Adam's: take a learning rate 3 to 10 times smaller, and a weight decay as many times
    larger.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, Program 1.

    Args:
        betas: The share of the momentum in the step's direction, and the decay of the momentum, by update; numbers or
            schedules.
        weight_decay: Decoupled, of those parameters that decay; a number or a schedule.
        decays: Which parameters those are; by default, those of two or more dimensions.
        groups: Parameters with hyperparameters of their own.

    Raises:
        ValueError: ``betas`` are not in [0, 1).
    """
    check_betas("lion", betas, 0.0)
    numbers = named("beta1", betas[0]), named("beta2", betas[1])

    def init(params: Flat) -> OptState:
        return {"exp_avg": slots_like(params)}

    def update(gradients: Gradients, state: OptState, params: Flat, context: UpdateContext) -> OptState:
        beta1, beta2 = context.valued(numbers[0]), context.valued(numbers[1])

        def rule(
            param: Tensor, gradient: Tensor, slots: Sequence[Tensor], rate: Scalar, decay: Scalar
        ) -> tuple[Tensor, Tensor]:
            (mean,) = slots
            direction = (mean * like(mean, beta1) + gradient * like(mean, 1 - beta1)).sign()
            param = param * like(param, 1 - rate * decay) - direction * like(param, rate)
            return param, mean * like(mean, beta2) + gradient * like(mean, 1 - beta2)

        updated(rule, gradients, params, state["exp_avg"], context=context)
        return state

    schedules = schedules_of(groups, weight_decay=weight_decay, beta1=betas[0], beta2=betas[1])
    return Optimizer(
        init, update, assigner(groups, weight_decay, decays), separable=True, elementwise=True, schedules=schedules
    )
