"""Flat storage: many named tensors in a few contiguous buffers, so that one operation reaches them all.

Parameters, optimizer slots, gradients and averages of one model share a :class:`Layout`. A norm, a copy, an update or a
collective is then one call a buffer, whatever the depth of the model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn.hyper import Hyper as Hyper

ALIGNMENT = 256
"""Bytes to which every tensor's start is aligned. Whole vectors are then processed whatever range of the buffer a
kernel is given, so that updating tensors together or one by one gives the same bits."""

CUTS_KEPT = 32
"""How many ways of cutting a layout are remembered; models whose gradients come and go have many."""


@attrs.frozen
class Leaf:
    """Where one named tensor lies: elements, not bytes."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    group: int
    buffer: int
    offset: int
    extent: int


@attrs.frozen
class Chunk:
    """A contiguous run of leaves in one buffer that are updated together; ``first`` is the index of its first leaf."""

    buffer: int
    start: int
    stop: int
    group: int
    first: int
    name: str | None = None


@attrs.frozen(eq=False)
class Layout:
    """The static plan of flat storage: leaves in the model's order, their places by data type and group."""

    leaves: tuple[Leaf, ...]
    groups: tuple[Hyper, ...]
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    index: Mapping[str, int]
    elements: int
    _cuts: dict[tuple[str, tuple[bool, ...]], tuple[Chunk, ...]] = attrs.field(factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        """How large the storage is, padding included."""
        return sum(size * dtype.itemsize for size, dtype in zip(self.sizes, self.dtypes, strict=True))

    def unit(self, buffer: int) -> int:
        """Give the number of elements to which the leaves of a buffer are aligned."""
        return ALIGNMENT // self.dtypes[buffer].itemsize

    def runs(self, active: tuple[bool, ...]) -> tuple[Chunk, ...]:
        """Join neighbouring leaves of one group into runs, leaving out those that are not active (by leaf index)."""
        return self._cut("runs", active, self._joined)

    def spans(self, active: tuple[bool, ...]) -> tuple[Chunk, ...]:
        """Give every active leaf its own range of the buffer, padding included."""
        return self._cut("spans", active, lambda active: tuple(self._single(i) for i, on in enumerate(active) if on))

    def singles(self, active: tuple[bool, ...]) -> tuple[Chunk, ...]:
        """Give every active leaf a chunk that is its shaped view."""
        return self._cut(
            "singles",
            active,
            lambda active: tuple(
                attrs.evolve(self._single(i), name=self.leaves[i].name) for i, on in enumerate(active) if on
            ),
        )

    def _single(self, i: int) -> Chunk:
        leaf = self.leaves[i]
        return Chunk(leaf.buffer, leaf.offset, leaf.offset + leaf.extent, leaf.group, i)

    def _cut(
        self, kind: str, active: tuple[bool, ...], make: Callable[[tuple[bool, ...]], tuple[Chunk, ...]]
    ) -> tuple[Chunk, ...]:
        if (kind, active) not in self._cuts:
            if len(self._cuts) >= CUTS_KEPT:
                self._cuts.clear()
            self._cuts[kind, active] = make(active)
        return self._cuts[kind, active]

    def _joined(self, active: tuple[bool, ...]) -> tuple[Chunk, ...]:
        chunks: list[Chunk] = []
        order = sorted(range(len(self.leaves)), key=lambda i: (self.leaves[i].buffer, self.leaves[i].offset))
        for i in order:
            leaf = self.leaves[i]
            stop = leaf.offset + leaf.extent
            last = chunks[-1] if chunks else None
            if not active[i]:
                continue
            if last and (last.buffer, last.stop, last.group) == (leaf.buffer, leaf.offset, leaf.group):
                chunks[-1] = attrs.evolve(last, stop=stop)
            else:
                chunks.append(Chunk(leaf.buffer, leaf.offset, stop, leaf.group, i))
        return tuple(chunks)


def shaped(leaf: Leaf, piece: Tensor) -> Tensor:
    """Shape a leaf's range of the buffer, as a compiler understands it best: by permuting, not by strides."""
    order = memory_order(leaf)
    line = piece[: math.prod(leaf.shape)].view([leaf.shape[i] for i in order])
    return line.permute([order.index(i) for i in range(len(order))])


def memory_order(leaf: Leaf) -> list[int]:
    """Give the dimensions in the order in which they lie in memory."""
    return sorted(range(len(leaf.shape)), key=lambda i: (-leaf.stride[i], i))


def layout_of(tensors: Mapping[str, Tensor], hypers: Mapping[str, Hyper] | None = None) -> Layout:
    """Plan the flat storage of named tensors.

    Args:
        tensors: By qualified name; only their shapes, strides and data types are read. Strides are kept where the
            tensor is dense (channels_last stays channels_last); others become contiguous.
        hypers: The hyperparameters of each; equal ones form a group, and groups of one ``part`` lie side by side.
            All alike if not given.
    """
    given = [hypers[name] if hypers else Hyper() for name in tensors]
    groups = _ordered(tuple(dict.fromkeys(given)))
    dtypes = tuple(dict.fromkeys(tensor.dtype for tensor in tensors.values()))
    ends = [0] * len(dtypes)
    leaves: dict[str, Leaf] = {}
    placed = sorted(zip(tensors.items(), given, strict=True), key=lambda item: groups.index(item[1]))
    for (name, tensor), hyper in placed:
        buffer = dtypes.index(tensor.dtype)
        unit = ALIGNMENT // tensor.element_size()
        extent = -(-max(tensor.numel(), 1) // unit) * unit
        leaves[name] = Leaf(
            name=name,
            shape=tuple(tensor.shape),
            stride=_dense_stride(tensor),
            dtype=tensor.dtype,
            group=groups.index(hyper),
            buffer=buffer,
            offset=ends[buffer],
            extent=extent,
        )
        ends[buffer] += extent
    return Layout(
        leaves=tuple(leaves[name] for name in tensors),
        groups=groups,
        sizes=tuple(ends),
        dtypes=dtypes,
        index={name: i for i, name in enumerate(tensors)},
        elements=sum(tensor.numel() for tensor in tensors.values()),
    )


def _ordered(hypers: tuple[Hyper, ...]) -> tuple[Hyper, ...]:
    """Bring those of one part together, and of one part of a part, in the order in which they first come."""
    paths = {hyper: tuple(accumulate(hyper.part.split("/"), "{}/{}".format)) for hyper in hypers}
    first = {path: i for i, path in reversed(list(enumerate(path for hyper in hypers for path in paths[hyper])))}
    return tuple(sorted(hypers, key=lambda hyper: [first[path] for path in paths[hyper]]))


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Keep a dense, non-overlapping stride; make any other contiguous."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


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
    _pieces: dict[int, tuple[tuple[Chunk, ...], tuple[Tensor, ...]]] = attrs.field(factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        view = self._views.get(name)
        if view is None:
            leaf = self.layout.leaves[self.layout.index[name]]
            buffer = self.buffers[leaf.buffer]
            if torch.compiler.is_compiling():
                view = shaped(leaf, buffer[leaf.offset : leaf.offset + leaf.extent])
            else:
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

    def pieces(self, chunks: tuple[Chunk, ...]) -> tuple[Tensor, ...]:
        """Cut out chunks: one-dimensional runs of a buffer, or, where a chunk names its leaf, the leaf's view."""
        found = self._pieces.get(id(chunks))
        if found is None or found[0] is not chunks:
            cut = tuple(self[c.name] if c.name else self.buffers[c.buffer][c.start : c.stop] for c in chunks)
            if len(self._pieces) >= CUTS_KEPT:
                self._pieces.clear()
            found = self._pieces[id(chunks)] = (chunks, cut)
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


def regrouped(flat: Flat, groups: tuple[Hyper, ...]) -> Flat:
    """Give the same storage with other hyperparameters for its groups, one each, in their order."""
    assert len(groups) == len(flat.layout.groups)
    return Flat(attrs.evolve(flat.layout, groups=groups), flat.buffers)


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
