"""The maths of torch's fused kernels as plain tensor operations: what compilers fuse by themselves.

Each does what the kernel of its name does, in place, and nothing where ``found_inf`` is 1. A flat buffer is updated as
one tensor, since a compiler writes to a part of one by writing all of it: what differs from parameter to parameter is
spread over the rows of the buffer, which are as long as parameters are aligned.
"""

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from forgather_fn.flat import Flat, Layout
from forgather_fn.gradient import Gradients
from forgather_fn.hyper import NO_VALUES, Values, valued


@attrs.frozen(eq=False)
class Piece:
    """What is updated as one tensor: a flat buffer in rows, or one parameter.

    Attributes:
        tensors: Parameters, gradients, and slots, in float32 at least.
        held: Where the new parameters and slots go.
        leaves: The index of the leaf in each row; one, where it is a parameter.
    """

    tensors: tuple[Tensor, ...]
    held: tuple[Tensor, ...]
    leaves: tuple[int, ...]

    def spread(self, values: Tensor) -> Tensor:
        """Give each row the value of its leaf, as a tensor that broadcasts against it."""
        values = values.to(self.tensors[0].dtype)
        if len(self.leaves) == 1:
            return values[self.leaves[0]]
        return values[torch.tensor(self.leaves, device=values.device)].unsqueeze(1)

    def constant(self, values: Sequence[float | Tensor]) -> Tensor | float:
        """Do the same for numbers, or scalar tensors; one that all rows share is given as it is."""
        own = [values[leaf] for leaf in self.leaves]
        if all(value is own[0] for value in own):
            return own[0]
        if not any(isinstance(value, Tensor) for value in own):
            if len(set(own)) == 1:
                return own[0]
            return torch.tensor(own, dtype=torch.float64, device=self.held[0].device).unsqueeze(1)
        known = {id(value): torch.as_tensor(value, dtype=torch.float64, device=self.held[0].device) for value in own}
        places = {number: i for i, number in enumerate(known)}
        rows = torch.tensor([places[id(value)] for value in own], device=self.held[0].device)
        return torch.stack(list(known.values()))[rows].unsqueeze(1)

    def write(self, new: Sequence[Tensor], active: Sequence[bool], found_inf: Tensor) -> None:
        """Take new values, but for rows of leaves without a gradient, and not where the flag is set."""
        kept = found_inf > 0
        rows = self.constant([float(on) for on in active])
        if isinstance(rows, Tensor):
            kept = kept | (rows == 0)
        for held, tensor in zip(self.held, new, strict=True):
            held.copy_(torch.where(kept, held, tensor.to(held.dtype)))


def pieces(gradients: Gradients, params: Flat, *slots: Flat) -> Iterator[Piece]:
    """Give what an update works on, buffer by buffer where the gradient is flat, else parameter by parameter."""
    layout = params.layout
    if gradients.flat is None:
        for name, gradient in gradients.views.items():
            yield _piece((params[name], *[slot[name] for slot in slots]), gradient, (layout.index[name],))
        return
    for number, gradient in enumerate(gradients.flat.buffers):
        unit = layout.unit(number)
        rows = [flat.buffers[number].view(-1, unit) for flat in (params, *slots)]
        yield _piece(rows, gradient.view(-1, unit), _owners(layout, number))


def _piece(held: Sequence[Tensor], gradient: Tensor, leaves: tuple[int, ...]) -> Piece:
    ordered = (held[0], gradient, *held[1:])
    return Piece(tuple(t.float() if t.dtype.itemsize < 4 else t for t in ordered), tuple(held), leaves)


def _owners(layout: Layout, buffer: int) -> tuple[int, ...]:
    """Say to which leaf each row of a buffer belongs."""
    own = sorted((leaf.offset, i) for i, leaf in enumerate(layout.leaves) if leaf.buffer == buffer)
    return tuple(i for _, i in own for _ in range(layout.leaves[i].extent // layout.unit(buffer)))


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
        rate, decay = _hyper(piece, params.layout, learning_rate, scheduled)
        gradient = gradient if gradients.divisor is None else gradient / gradients.divisor
        if decoupled:
            param = param * _as(param, 1 - rate * decay)
        else:
            gradient = gradient + param * _as(param, decay)
        mean = mean + (gradient - mean) * _as(param, 1 - betas[0])
        square = square * _as(param, betas[1]) + gradient * gradient * _as(param, 1 - betas[1])
        root = square.sqrt() / piece.spread(remaining[1].sqrt()) + eps
        param = param - _as(param, rate) / piece.spread(remaining[0]) * mean / root
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
        rate, decay = _hyper(piece, params.layout, learning_rate, scheduled)
        gradient = gradient if gradients.divisor is None else gradient / gradients.divisor
        gradient = gradient + param * _as(param, decay)
        kept = _as(param, momentum)
        running = [slot * kept + gradient for slot in running]
        for slot in running:
            gradient = gradient + slot * kept if nesterov else slot
        piece.write((param - _as(param, rate) * gradient, *running), gradients.active, found_inf)


def _hyper(
    piece: Piece, layout: Layout, learning_rate: float | Tensor, scheduled: Values
) -> tuple[float | Tensor, float | Tensor]:
    """Give learning rate and weight decay of each row."""
    rates = [valued(group.learning_rate, scheduled) for group in layout.groups]
    decays = [valued(group.weight_decay or 0.0, scheduled) for group in layout.groups]
    own = [leaf.group for leaf in layout.leaves]
    return learning_rate * piece.constant([rates[i] for i in own]), piece.constant([decays[i] for i in own])


def _as(like: Tensor, value: float | Tensor) -> float | Tensor:
    return value.to(like.dtype) if isinstance(value, Tensor) else value
