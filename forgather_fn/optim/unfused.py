"""The maths of torch's fused kernels as plain tensor operations: what compilers fuse by themselves.

Each does what the kernel of its name does, in place, and nothing where ``found_inf`` is 1; see
:mod:`~forgather_fn.optim.rows`.
"""

import torch
from torch import Tensor

from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.hyper import Scalar
from forgather_fn.optim.base import UpdateContext
from forgather_fn.optim.rows import like, operands


def adam(
    gradients: Gradients,
    params: Flat,
    means: Flat,
    squares: Flat,
    counts: Tensor,
    *,
    decoupled: bool,
    betas: tuple[Scalar, Scalar],
    eps: float,
    context: UpdateContext,
) -> None:
    """Do what ``torch._fused_adamw_`` does, or, where weight decay is not ``decoupled``, ``torch._fused_adam_``.

    Args:
        gradients: Of this step.
        params: The parameters.
        means: Their running means of gradients.
        squares: Their running means of squared gradients.
        counts: Updates of each parameter, this one included: floating, one a leaf.
        decoupled: Whether weight decay acts on the parameters or is added to the gradient.
        betas: Decay of the running mean and of the running mean square, by update.
        eps: Added to the root of the mean square.
        context: Of the update.
    """
    exact = counts.double()  # a count in float32 would show where parameters are float64
    remaining = [1 - torch.exp(exact * torch.as_tensor(beta, dtype=torch.float64).log()) for beta in betas]
    for own in operands(gradients, params, means, squares):
        param, gradient, mean, square = own.tensors
        rate, decay = own.hypers(params.layout, context)
        gradient = gradient if gradients.divisor is None else gradient / gradients.divisor
        if decoupled:
            param = param * like(param, 1 - rate * decay)
        else:
            gradient = gradient + param * like(param, decay)
        mean = mean + (gradient - mean) * like(param, 1 - betas[0])
        square = square * like(param, betas[1]) + gradient * gradient * like(param, 1 - betas[1])
        root = square.sqrt() / own.spread(remaining[1].sqrt()) + eps
        param = param - like(param, rate) / own.spread(remaining[0]) * mean / root
        own.write((param, mean, square), gradients.active, context.found_inf)


def sgd(
    gradients: Gradients,
    params: Flat,
    *slots: Flat,
    momentum: Scalar,
    nesterov: bool,
    context: UpdateContext,
) -> None:
    """Do what ``torch._fused_sgd_`` does; ``slots`` is the momentum, if there is any."""
    for own in operands(gradients, params, *slots):
        param, gradient, *running = own.tensors
        rate, decay = own.hypers(params.layout, context)
        gradient = gradient if gradients.divisor is None else gradient / gradients.divisor
        gradient = gradient + param * like(param, decay)
        kept = like(param, momentum)
        running = [slot * kept + gradient for slot in running]
        for slot in running:
            gradient = gradient + slot * kept if nesterov else slot
        own.write((param - like(param, rate) * gradient, *running), gradients.active, context.found_inf)
