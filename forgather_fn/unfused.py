"""The maths of torch's fused kernels as plain tensor operations: what compilers fuse by themselves.

Each does to one :class:`~forgather_fn.parts.Part` what the kernel of its name does, in place, and nothing where
``found_inf`` is 1. Numbers that differ from parameter to parameter are spread over the blocks of the flat storage
rather than over its elements, so that a whole run of parameters stays one loop.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from forgather_fn.flat import Chunk, Layout
from forgather_fn.parts import Part


def adam(
    part: Part,
    gradients: Sequence[Tensor],
    layout: Layout,
    counts: Tensor,
    *,
    decoupled: bool,
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    divisor: Tensor | None,
    found_inf: Tensor,
) -> None:
    """Do what ``torch._fused_adamw_`` does, or, where weight decay is not ``decoupled``, ``torch._fused_adam_``.

    Args:
        part: Parameters, running means, running mean squares.
        gradients: Cut as the parameters are.
        layout: Of the parameters.
        counts: Updates of each parameter, this one included: floating, one a leaf.
        decoupled: Whether weight decay acts on the parameters or is added to the gradient.
        learning_rate: Of this step.
        betas: Decay of the running mean and of the running mean square, by update.
        eps: Added to the root of the mean square.
        divisor: A scalar by which the gradient is divided, if any.
        found_inf: 1 where nothing must change, else 0.
    """
    rate = learning_rate * part.hyper.learning_rate
    decay = part.hyper.weight_decay or 0.0
    exact = counts.double()  # where parameters are float64, a count in float32 would show
    sizes, roots = rate / (1 - betas[0] ** exact), (1 - betas[1] ** exact).sqrt()
    for i, chunk in enumerate(part.chunks):
        tensors = (part.params[i], part.slots[0][i], part.slots[1][i], gradients[i])
        size, root = _spread(sizes, layout, chunk), _spread(roots, layout, chunk)
        held = [_blocks(t, layout, chunk) for t in tensors]
        param, mean, square, gradient = [t.float() if t.dtype.itemsize < 4 else t for t in held]
        size, root = size.to(param.dtype), root.to(param.dtype)
        gradient = gradient if divisor is None else gradient / divisor
        if decoupled:
            param = param * (1 - rate * decay)
        else:
            gradient = gradient + param * decay
        mean = mean + (gradient - mean) * (1 - betas[0])
        square = square * betas[1] + gradient * gradient * (1 - betas[1])
        param = param - size * mean / (square.sqrt() / root + eps)
        for old, new in zip(held, (param, mean, square), strict=False):
            _replace(old, new, found_inf)


def sgd(
    part: Part,
    gradients: Sequence[Tensor],
    *,
    learning_rate: float | Tensor,
    momentum: float,
    nesterov: bool,
    divisor: Tensor | None,
    found_inf: Tensor,
) -> None:
    """Do what ``torch._fused_sgd_`` does; for the arguments see :func:`adam` and :func:`~forgather_fn.optim.sgd`."""
    rate = learning_rate * part.hyper.learning_rate
    for i, held in enumerate(part.params):
        param, gradient = [t.float() if t.dtype.itemsize < 4 else t for t in (held, gradients[i])]
        gradient = gradient if divisor is None else gradient / divisor
        gradient = gradient + param * (part.hyper.weight_decay or 0.0)
        if momentum:
            slot = part.slots[0][i]
            running = slot * momentum + gradient
            gradient = gradient + running * momentum if nesterov else running
            _replace(slot, running, found_inf)
        _replace(held, param - rate * gradient, found_inf)


def _replace(old: Tensor, new: Tensor, found_inf: Tensor) -> None:
    old.copy_(torch.where(found_inf > 0, old, new.to(old.dtype)))


def _blocks(tensor: Tensor, layout: Layout, chunk: Chunk) -> Tensor:
    return tensor if chunk.name else tensor.view(-1, layout.unit(chunk.buffer))


def _spread(values: Tensor, layout: Layout, chunk: Chunk) -> Tensor:
    """Give the value of each leaf to its blocks, so that it broadcasts against them."""
    if chunk.name:
        return values[chunk.first]
    unit = layout.unit(chunk.buffer)
    inside = [
        (leaf.offset, i, leaf.extent // unit)
        for i, leaf in enumerate(layout.leaves)
        if leaf.buffer == chunk.buffer and chunk.start <= leaf.offset < chunk.stop
    ]
    owners = [i for _, i, blocks in sorted(inside) for _ in range(blocks)]
    return values[torch.tensor(owners, device=values.device)].unsqueeze(1)
