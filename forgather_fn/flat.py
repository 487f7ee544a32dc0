"""Flat storage: many named tensors in a few contiguous buffers, so that one operation reaches them all.

Parameters, optimizer slots, gradients and averages of one model share a :class:`~forgather_fn.layout.Layout`. A norm, a
copy, an update or a collective is then one call a buffer, whatever the depth of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn.hyper import Hyper as Hyper
from forgather_fn.layout import ALIGNMENT as ALIGNMENT
from forgather_fn.layout import CUTS_KEPT as CUTS_KEPT
from forgather_fn.layout import Chunk as Chunk
from forgather_fn.layout import Layout as Layout
from forgather_fn.layout import Leaf as Leaf
from forgather_fn.layout import layout_of as layout_of
from forgather_fn.layout import memory_order as memory_order
from forgather_fn.layout import shaped as shaped


@attrs.frozen(eq=False, repr=False)
class Flat(Mapping[str, Tensor]):
    """A read-only mapping of named tensors that are views of a few flat buffers.

    Attributes:
        layout: Where each lies.
        buffers: The storage, one tensor a data type.
        kept: Whatever is derived from this storage and worth keeping as long as it lives.
    """

    layout: Layout
    buffers: tuple[Tensor, ...]
    kept: dict[str, Any] = attrs.field(factory=dict)
    _views: dict[str, Tensor] = attrs.field(factory=dict)
    _slices: dict[int, tuple[tuple[Chunk, ...], tuple[Tensor, ...]]] = attrs.field(factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        view = self._views.get(name)
        if view is None:
            leaf = self.layout.leaves[self.layout.index[name]]
            buffer = self.buffers[leaf.buffer]
            # In a graph too: what is written to a slice of a buffer, a compiler writes by going over all of the buffer.
            view = buffer.as_strided(leaf.shape, leaf.stride, buffer.storage_offset() + leaf.offset)
            self._views[name] = view
        return view

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the views, which would come back with memory of their own.
        return Flat, (self.layout, self.buffers)

    def alias(self, name: str) -> Tensor:
        """Give the same view with a version counter of its own; always the same object.

        Autograd takes a change of one view for a change of all that share its counter.
        """
        aliases: dict[str, Tensor] = self.kept.setdefault("aliases", {})
        if name not in aliases:
            aliases[name] = self[name].data
        return aliases[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.index)

    def __len__(self) -> int:
        return len(self.layout.leaves)

    def __repr__(self) -> str:
        return f"Flat({self.layout.elements:,} elements in {len(self)} tensors)"

    def copy(self) -> "Flat":
        """Copy to storage of its own: one operation a buffer."""
        return Flat(self.layout, tuple(buffer.clone() for buffer in self.buffers))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Flat":
        """Make another of the same layout from whole buffers; zero must map to zero, for the padding."""
        return Flat(self.layout, tuple(function(buffer) for buffer in self.buffers))

    def assign(self, other: "Flat") -> None:
        """Take over the values of another of the same layout, in place."""
        for mine, others in zip(self.buffers, other.buffers, strict=True):
            mine.copy_(others)

    def slices(self, chunks: tuple[Chunk, ...]) -> tuple[Tensor, ...]:
        """Cut out chunks: one-dimensional runs of a buffer, or, where a chunk names its leaf, the leaf's view."""
        found = self._slices.get(id(chunks))
        if found is None or found[0] is not chunks:
            cut = tuple(self[c.name] if c.name else self.buffers[c.buffer][c.start : c.stop] for c in chunks)
            if len(self._slices) >= CUTS_KEPT + len(self):
                self._slices.clear()
            found = self._slices[id(chunks)] = (chunks, cut)
        return found[1]


def zeros(layout: Layout, device: torch.device, room: int = 0) -> Flat:
    """Make flat storage filled with zeros, padding included.

    Args:
        layout: Where everything lies.
        device: Of the storage.
        room: Elements that the memory of the first buffer has behind its end.
    """
    sizes = zip(layout.sizes, layout.dtypes, strict=True)
    buffers = [torch.zeros(size, dtype=dtype, device=device) for size, dtype in sizes]
    if room:
        buffers[0] = buffers[0].new_zeros(layout.sizes[0] + room)[: layout.sizes[0]]
    return Flat(layout, tuple(buffers))


def filled(layout: Layout, tensors: Mapping[str, Tensor], device: torch.device) -> Flat:
    """Make flat storage and copy named tensors into it.

    Raises:
        ValueError: A name is missing or unexpected, or a shape differs.
    """
    flat = zeros(layout, device)
    write(flat, tensors)
    return flat


def write(flat: Flat, tensors: Mapping[str, Any]) -> None:
    """Copy named tensors into flat storage, all of them.

    Raises:
        ValueError: A name is missing or unexpected, or a shape differs; both sides are shown.
    """
    missing, extra = sorted(set(flat) - set(tensors)), sorted(set(tensors) - set(flat))
    if missing or extra:
        raise ValueError(
            f"the names do not match: missing {listed(missing)}, unexpected {listed(extra)}. "
            "Give exactly the tensors of this model."
        )
    with torch.no_grad():
        for name, view in flat.items():
            if view.shape != tensors[name].shape:
                raise ValueError(f"{name}: expected shape {tuple(view.shape)}, got {tuple(tensors[name].shape)}")
            view.copy_(tensors[name])


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Write a list of names for an error message, cut to a few.

    Example:
        >>> listed(["a", "b", "c"], limit=2)
        "'a', 'b' and 1 more"
        >>> listed([])
        'none'
    """
    if not names:
        return "none"
    shown = ", ".join(map(repr, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
