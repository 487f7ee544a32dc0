"""Where named tensors lie in flat storage: the static plan of a few contiguous buffers."""

import math
from collections.abc import Callable, Mapping
from itertools import accumulate

import attrs
import torch
from torch import Tensor

from forgather_fn.hyper import Hyper
from forgather_fn.wide import wide_dtype

ALIGNMENT = 256
"""Bytes to which every tensor's start is aligned. Whole vectors are then processed whatever range of the buffer a
kernel is given, so that updating tensors together or one by one gives the same bits."""

CUTS_KEPT = 32
"""How many ways of cutting a layout are remembered, beside each of its leaves alone; models whose gradients come and go
have many."""


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

    def widened(self) -> "Layout":
        """Give the same places in at least float32, for sums of what is in half precision; itself, if nothing is."""
        if all(dtype.itemsize >= 4 for dtype in self.dtypes):
            return self
        leaves = tuple(attrs.evolve(leaf, dtype=wide_dtype(leaf.dtype)) for leaf in self.leaves)
        return attrs.evolve(self, leaves=leaves, dtypes=tuple(map(wide_dtype, self.dtypes)), cuts={})

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

    def alone(self, i: int) -> tuple[bool, ...]:
        """Say that one leaf is active and no other."""
        return (False,) * i + (True,) + (False,) * (len(self.leaves) - i - 1)

    def _single(self, i: int) -> Chunk:
        leaf = self.leaves[i]
        return Chunk(leaf.buffer, leaf.offset, leaf.offset + leaf.extent, leaf.group, i)

    def _cut(
        self, kind: str, active: tuple[bool, ...], make: Callable[[tuple[bool, ...]], tuple[Chunk, ...]]
    ) -> tuple[Chunk, ...]:
        if (kind, active) not in self._cuts:
            if len(self._cuts) >= CUTS_KEPT + len(self.leaves):
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
