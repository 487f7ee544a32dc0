"""Where backward passes leave their gradients.

On small models they are views of flat buffers: zeroing, the norm and the update are then one call each, which counts
where calls are what takes time. On large ones they are autograd's own tensors, which saves reading and writing all of
them once more, and counts where memory is what takes time.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import torch
from torch import Tensor, nn

from forgather_fn import flat as flat_storage
from forgather_fn.flat import Flat, Layout
from forgather_fn.gradient import Gradients

VIEWED_ELEMENTS = 1_000_000
"""Up to this many parameters, gradients are views of flat buffers (measured: ``docs/performance.md``)."""


class Collect(Protocol):
    """Read the gradients."""

    def __call__(self, samples: int, weight: Tensor | float, /) -> Gradients:
        """Give what backward passes since ``clear`` left, of so many samples of this weight."""
        ...


@attrs.frozen(eq=False)
class Workspace:
    """How the gradients of one module are made ready for backward passes, and read after them.

    Attributes:
        layout: Where gradients lie: that of the parameters, or the same in a wider type.
        clear: Make ready: no gradient is there.
        collect: Read what came.
        renew: Make new storage. A module that was moved (``.to()``, ``.double()``) has moved its gradients too: the
            tensors are the same, their memory is not.
        release: Let go of memory that is not needed until the next step.
        reserve: Keep room for so many elements behind the first flat buffer, in the same memory, from the next
            ``clear`` on: for what is sent along with the gradient.
    """

    layout: Layout
    clear: Callable[[], None]
    collect: Collect
    renew: Callable[[], None]
    release: Callable[[], None]
    reserve: Callable[[int], None]


def workspace(
    layout: Layout, parameters: Sequence[Sequence[nn.Parameter]], device: torch.device, viewed_elements: int
) -> Workspace:
    """Choose the storage of gradients by the size of the model.

    Args:
        layout: Of the parameters, or the same in a wider type, in which their gradients are then added.
        parameters: For each leaf of the layout, the parameters that are it: several where storage is tied.
        device: Where they are.
        viewed_elements: Up to how many elements gradients are views of flat buffers.
    """
    for leaf, own in zip(layout.leaves, parameters, strict=True):
        for parameter in own:
            if parameter.grad_dtype != leaf.dtype:
                parameter.grad = None
                parameter.grad_dtype = leaf.dtype
    if layout.elements <= viewed_elements:
        return _viewed(layout, parameters, device)
    return _owned(layout, parameters)


def _viewed(layout: Layout, parameters: Sequence[Sequence[nn.Parameter]], device: torch.device) -> Workspace:
    room, flat = 0, Flat(layout, ())
    everything = (True,) * len(layout.leaves)
    versions: list[int] = []
    larger: list[int] = []
    named: dict[str, Tensor] = {}
    pairs: list[tuple[nn.Parameter, Tensor]] = []

    def renew() -> None:
        nonlocal flat, named
        for parameter, view in pairs:  # the old storage goes before the new one comes
            if parameter.grad is view:
                parameter.grad = None
        pairs.clear()
        named.clear()
        flat = Flat(layout, ())
        flat = flat_storage.zeros(layout, device, room)
        # A version counter of its own tells of each view whether a backward pass wrote to it.
        named = {leaf.name: flat.alias(leaf.name) for leaf in layout.leaves}
        pairs[:] = [(p, view) for ps, view in zip(parameters, named.values(), strict=True) for p in ps]

    def clear() -> None:
        if larger:
            larger.clear()
            renew()
        for buffer in flat.buffers:
            buffer.zero_()
        for parameter, view in pairs:
            if parameter.grad is not view:
                parameter.grad = view
        versions[:] = [view._version for view in named.values()]

    def collect(samples: int, weight: Tensor | float, /) -> Gradients:
        active = tuple([view._version != before for view, before in zip(named.values(), versions, strict=True)])
        present = named if active == everything else {name: named[name] for name in itertools.compress(named, active)}
        return Gradients(layout, active, present, flat, samples, weight)

    def reserve(elements: int) -> None:
        nonlocal room
        room = elements
        larger.append(room)

    renew()
    return Workspace(layout, clear, collect, renew, release=lambda: None, reserve=reserve)


def _owned(layout: Layout, parameters: Sequence[Sequence[nn.Parameter]]) -> Workspace:
    every = [p for ps in parameters for p in ps]

    def clear() -> None:
        for parameter in every:
            parameter.grad = None

    def collect(samples: int, weight: Tensor | float, /) -> Gradients:
        tensors = {}
        for leaf, ps in zip(layout.leaves, parameters, strict=True):
            found = [p.grad for p in ps if p.grad is not None]
            if found:
                tensors[leaf.name] = dense(leaf.name, found, leaf.stride)
        active = tuple(leaf.name in tensors for leaf in layout.leaves)
        return Gradients(layout, active, tensors, None, samples, weight)

    return Workspace(layout, clear, collect, renew=clear, release=clear, reserve=lambda elements: None)


def dense(name: str, found: list[Tensor], stride: tuple[int, ...]) -> Tensor:
    """Add up the gradients of the parameters that are one leaf, in the strides of the leaf.

    Raises:
        ValueError: One is sparse.
    """
    total = found[0]
    for other in found[1:]:
        total = total + other
    if total.layout is not torch.strided:
        raise ValueError(
            f"{name} got a sparse gradient ({total.layout}), which flat storage does not hold; build its layer with "
            "sparse=False"
        )
    return total if total.stride() == stride else total.new_empty_strided(total.shape, stride).copy_(total)
