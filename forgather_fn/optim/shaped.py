"""What optimizers share that need the shapes of parameters, and so go through them one by one."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from forgather_fn.finite import BAD, FINE
from forgather_fn.flat import Flat, Layout, layout_of, zeros
from forgather_fn.gradient import Gradients
from forgather_fn.optim.base import UpdateContext
from forgather_fn.wide import wide, wide_dtype


@attrs.frozen(eq=False)
class Own:
    """One parameter that has a gradient.

    Attributes:
        name: Its qualified name.
        number: The index of its leaf.
        param: The parameter, to be written to with :func:`take`.
        value: The same in float32 at least.
        gradient: Its gradient, in the type of ``value``.
        rate: Its learning rate.
        decay: Its weight decay.
    """

    name: str
    number: int
    param: Tensor
    value: Tensor
    gradient: Tensor
    rate: float | Tensor
    decay: float | Tensor


def one_by_one(gradients: Gradients, params: Flat, context: UpdateContext) -> Iterator[Own]:
    """Give the parameters that are to be updated; none where the host knows that nothing must change."""
    if context.found_inf is BAD:
        return
    gradients = gradients.resolved()
    layout = params.layout
    for name, gradient in gradients.views.items():
        number = layout.index[name]
        hyper = layout.groups[layout.leaves[number].group]
        yield Own(
            name,
            number,
            params[name],
            wide(params[name]),
            wide(gradient),
            *context.rates_of(hyper),
        )


def take(held: Tensor, new: Tensor, found_inf: Tensor) -> None:
    """Write a new value, unless the flag is set."""
    held.copy_(new if found_inf is FINE else torch.where(found_inf > 0, held, new.to(held.dtype)))


def wide_slots(layout: Layout, shapes: dict[str, tuple[int, ...]], device: torch.device) -> Flat:
    """Make a slot of zeros whose tensors have shapes of their own, in float32 at least.

    Args:
        layout: Of the parameters.
        shapes: By the names of parameters.
        device: Where it lies.
    """
    dtypes = {leaf.name: wide_dtype(leaf.dtype) for leaf in layout.leaves}
    like = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
    return zeros(layout_of(like), device)
