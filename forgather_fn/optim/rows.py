"""What element-wise updates work on where no fused kernel does the work: whole flat buffers, in rows.

A flat buffer is updated as one tensor: in eager mode that is one call an operation, and a compiler writes to a part of
a buffer by writing all of it. What differs from parameter to parameter is spread over the rows of the buffer, which are
as long as parameters are aligned.
"""

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor

from forgather_fn.finite import FINE
from forgather_fn.flat import Flat, Layout
from forgather_fn.gradient import Gradients
from forgather_fn.hyper import Scalar
from forgather_fn.optim.base import UpdateContext
from forgather_fn.wide import wide


@attrs.frozen(eq=False)
class Operands:
    """What is updated as one tensor: a flat buffer in rows, or one parameter.

    Attributes:
        tensors: Parameters, gradients, and slots, in float32 at least.
        held: Where the new parameters and slots go.
        leaves: The indices of the leaves in it.
        owners: The index of the leaf in each row; None where it is one parameter.
    """

    tensors: tuple[Tensor, ...]
    held: tuple[Tensor, ...]
    leaves: tuple[int, ...]
    owners: Tensor | None = None

    def spread(self, values: Tensor) -> Tensor:
        """Give each row the value of its leaf, as a tensor that broadcasts against it."""
        return values[self.leaves[0]] if self.owners is None else values[self.owners].unsqueeze(1)

    def constant(self, values: Sequence[Scalar]) -> Scalar:
        """Do the same for numbers, or scalar tensors; one that all rows share is given as it is."""
        first = values[self.leaves[0]]
        if all(values[leaf] is first for leaf in self.leaves):
            return first
        device = self.held[0].device
        if any(isinstance(value, Tensor) for value in values):
            distinct = {id(value): torch.as_tensor(value, dtype=torch.float64, device=device) for value in values}
            places = {number: place for place, number in enumerate(distinct)}
            which = torch.tensor([places[id(value)] for value in values], device=device)
            return self.spread(torch.stack(list(distinct.values()))[which])
        if all(values[leaf] == first for leaf in self.leaves):
            return first
        return self.spread(torch.tensor(values, dtype=torch.float64, device=device))

    def write(self, new: Sequence[Tensor], active: Sequence[bool], found_inf: Tensor) -> None:
        """Take new values, but for rows of leaves without a gradient, and not where the flag is set."""
        rows = self.constant(active)
        if found_inf is FINE and not isinstance(rows, Tensor):
            for held, tensor in zip(self.held, new, strict=True):
                held.copy_(tensor)
            return
        kept = found_inf > 0
        if isinstance(rows, Tensor):
            kept = kept | (rows == 0)
        for held, tensor in zip(self.held, new, strict=True):
            held.copy_(torch.where(kept, held, tensor.to(held.dtype)))

    def hypers(self, layout: Layout, context: UpdateContext) -> tuple[Scalar, Scalar]:
        """Give learning rate and weight decay of each row."""
        if self.owners is None:
            return context.rates_of(layout.groups[layout.leaves[self.leaves[0]].group])
        rates = [context.valued(group.learning_rate) for group in layout.groups]
        decays = [context.valued(group.weight_decay or 0.0) for group in layout.groups]
        own = [leaf.group for leaf in layout.leaves]
        return context.learning_rate * self.constant([rates[i] for i in own]), self.constant([decays[i] for i in own])


def operands(gradients: Gradients, params: Flat, *slots: Flat) -> Iterator[Operands]:
    """Give what an update works on, buffer by buffer where the gradient is flat, else parameter by parameter."""
    layout = params.layout
    if gradients.flat is None:
        for name, gradient in gradients.views.items():
            yield _operands((params[name], *[slot[name] for slot in slots]), gradient, (layout.index[name],), None)
        return
    for number, gradient in enumerate(gradients.flat.buffers):
        unit = layout.unit(number)
        rows = [flat.buffers[number].view(-1, unit) for flat in (params, *slots)]
        leaves, owners = _owners(layout, number, gradient.device)
        yield _operands(rows, gradient.view(-1, unit), leaves, owners if len(leaves) > 1 else None)


def _operands(held: Sequence[Tensor], gradient: Tensor, leaves: tuple[int, ...], owners: Tensor | None) -> Operands:
    ordered = (held[0], gradient, *held[1:])
    return Operands(tuple(wide(t) for t in ordered), tuple(held), leaves, owners)


_KNOWN: WeakKeyDictionary[Layout, dict[tuple[int, torch.device], tuple[tuple[int, ...], Tensor]]] = WeakKeyDictionary()


def _owners(layout: Layout, buffer: int, device: torch.device) -> tuple[tuple[int, ...], Tensor]:
    """Say which leaves lie in a buffer, and to which of them each row belongs."""
    known = _KNOWN.setdefault(layout, {})
    if (buffer, device) in known and not torch.compiler.is_compiling():
        return known[buffer, device]
    leaves = tuple(
        i for _, i in sorted((leaf.offset, i) for i, leaf in enumerate(layout.leaves) if leaf.buffer == buffer)
    )
    unit = layout.unit(buffer)
    owners = torch.tensor([i for i in leaves for _ in range(layout.leaves[i].extent // unit)], device=device)
    if type(owners) is Tensor and not torch.compiler.is_compiling():  # and not one that stands for a tensor
        known[buffer, device] = leaves, owners
    return leaves, owners


def like(tensor: Tensor, value: Scalar) -> Scalar:
    """Bring a scalar to the type of the tensor that it is to be multiplied with."""
    return value.to(tensor.dtype) if isinstance(value, Tensor) else value
