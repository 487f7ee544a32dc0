"""The maths of torch's fused kernels as plain tensor operations: what compilers fuse by themselves.

Each does what the kernel of its name does, in place, and nothing where ``found_inf`` is 1; see
:mod:`~forgather_fn.optim.rows`.
"""

import torch
from torch import Tensor

from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.hyper import NO_VALUES, Values
from forgather_fn.optim.rows import like, pieces


def adam(
    gradients: Gradients,
    params: Flat,
    means: Flat,
    squares: Flat,
    counts: Tensor,
    *,
    decoupled: bool,
    learning_rate: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    found_inf: Tensor,
    scheduled: Values = NO_VALUES,
) -> None:
    """Do what ``torch._fused_adamw_`` does, or, where weight decay is not ``decoupled``, ``torch._fused_adam_``.

    Args:
        gradients: Of this step.
        params: The parameters.
        means: Their running means of gradients.
        squares: Their running means of squared gradients.
        counts: Updates of each parameter, this one included: floating, one a leaf.
        decoupled: Whether weight decay acts on the parameters or is added to the gradient.
        learning_rate: Of this step.
        betas: Decay of the running mean and of the running mean square, by update.
        eps: Added to the root of the mean square.
        found_inf: 1 where nothing must change, else 0.
        scheduled: The values of schedules.
    """
    exact = counts.double()  # a count in float32 would show where parameters are float64
    remaining = [1 - torch.exp(exact * torch.as_tensor(beta, dtype=torch.float64).log()) for beta in betas]
    for piece in pieces(gradients, params, means, squares):
        param, gradient, mean, square = piece.tensors
        rate, decay = piece.hypers(params.layout, learning_rate, scheduled)
        gradient = gradient if gradients.divisor is None else gradient / gradients.divisor
        if decoupled:
            param = param * like(param, 1 - rate * decay)
        else:
            gradient = gradient + param * like(param, decay)
        mean = mean + (gradient - mean) * like(param, 1 - betas[0])
        square = square * like(param, betas[1]) + gradient * gradient * like(param, 1 - betas[1])
        root = square.sqrt() / piece.spread(remaining[1].sqrt()) + eps
        param = param - like(param, rate) / piece.spread(remaining[0]) * mean / root
        piece.write((param, mean, square), gradients.active, found_inf)


def sgd(
    gradients: Gradients,
    params: Flat,
    *slots: Flat,
    learning_rate: float | Tensor,
    momentum: float | Tensor,
    nesterov: bool,
    found_inf: Tensor,
    scheduled: Values = NO_VALUES,
) -> None:
    """Do what ``torch._fused_sgd_`` does; ``slots`` is the momentum, if there is any."""
    for piece in pieces(gradients, params, *slots):
        param, gradient, *running = piece.tensors
        rate, decay = piece.hypers(params.layout, learning_rate, scheduled)
        gradient = gradient if gradients.divisor is None else gradient / gradients.divisor
        gradient = gradient + param * like(param, decay)
        kept = like(param, momentum)
        running = [slot * kept + gradient for slot in running]
        for slot in running:
            gradient = gradient + slot * kept if nesterov else slot
        piece.write((param - like(param, rate) * gradient, *running), gradients.active, found_inf)
