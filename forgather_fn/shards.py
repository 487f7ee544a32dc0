"""Tensors cut along their first dimension, one block of rows to each process.

The blocks are those of ``torch.chunk``, as ``fully_shard`` cuts: of equal length but for the last ones, which are
shorter or empty. In flat storage each has the room of a full block, the rest of it zeros: all processes have the same
layout but for shapes, and the blocks of a tensor are gathered as they lie.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from forgather_fn import flat as flat_storage
from forgather_fn.flat import Flat, Hyper, Layout, layout_of, listed
from forgather_fn.tree import rebuilt
from forgather_fn.world import World


class Rows(Protocol):
    """Say which rows of a tensor, of a parameter's shape, a process needs."""

    def __call__(self, length: int, /) -> slice:
        """Give them, of so many."""
        ...


def rows(length: int, rank: int, size: int) -> slice:
    """Say which rows of a tensor of so many are a process's.

    Example:
        >>> [rows(5, rank, 4) for rank in range(4)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    block = -(-length // size)
    return slice(min(rank * block, length), min((rank + 1) * block, length))


@attrs.frozen(eq=False)
class Shards:
    """How some named tensors are cut among the processes of a world.

    Attributes:
        world: The processes.
        whole: The layout of the whole tensors.
        layout: Of this process's blocks of them.
    """

    world: World
    whole: Layout
    layout: Layout

    def cut(self, tensors: Mapping[str, Tensor], device: torch.device) -> Flat:
        """Copy this process's block of every tensor to storage of its own."""
        return flat_storage.filled(
            self.layout, {name: self.mine(name, tensors[name]) for name in self.layout.index}, device
        )

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """Cut this process's rows out of a whole tensor.

        Raises:
            ValueError: It is not of the shape that was planned.
        """
        expected = self.whole.leaves[self.whole.index[name]].shape
        if tuple(whole.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(whole.shape)}")
        return whole[rows(len(whole), self.world.rank, self.world.size)]

    def block(self, flat: Flat, name: str) -> Tensor:
        """Give the memory of a tensor's block, filled up with zeros to the length of a full one; one-dimensional."""
        number = self.layout.index[name]
        leaf, shape = self.layout.leaves[number], self.whole.leaves[number].shape
        count = -(-shape[0] // self.world.size) * _row_size(shape)
        return flat.buffers[leaf.buffer][leaf.offset : leaf.offset + count]

    def gathered(self, flat: Flat, name: str) -> Tensor:
        """Give a whole tensor on every process. This is collective."""
        from torch import distributed

        block = self.block(flat, name)
        whole = block.new_empty(self.world.size * len(block))
        with self.world.explained():
            distributed.all_gather_single(whole, block, group=self.world.group)
        return self._trimmed(whole, name)

    def gathered_on_first(self, flat: Flat, name: str) -> Tensor | None:
        """Give a whole tensor on the first process, None on the others. This is collective."""
        from torch import distributed

        block = self.block(flat, name)
        whole = block.new_empty(self.world.size * len(block)) if self.world.main else None
        places = None if whole is None else list(whole.chunk(self.world.size))
        with self.world.explained():
            distributed.gather(block, places, group=self.world.group, group_dst=0)
        return None if whole is None else self._trimmed(whole, name)

    def _trimmed(self, blocks: Tensor, name: str) -> Tensor:
        shape = self.whole.leaves[self.whole.index[name]].shape
        return blocks[: shape[0] * _row_size(shape)].view(shape)

    def collected(self, flat: Flat) -> Flat | None:
        """Give whole tensors in the memory of the first process's host, None on the others. This is collective.

        One tensor after the other is gathered, so that no device needs more than room for one whole tensor besides.
        """
        host = flat_storage.zeros(self.whole, torch.device("cpu")) if self.world.main else None
        for leaf in self.whole.leaves:
            whole = self.gathered_on_first(flat, leaf.name)
            if host is not None:
                assert whole is not None
                host[leaf.name].copy_(whole)
        return host


def _row_size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[1:]).numel()


def shards_of(tensors: Mapping[str, Tensor], world: World, hypers: Mapping[str, Hyper] | None = None) -> Shards:
    """Plan how named tensors are cut, and the flat storage of this process's blocks.

    Args:
        tensors: Whole ones, by qualified name; only their shapes, strides and data types are read.
        world: The processes.
        hypers: The hyperparameters of each; all alike if not given.

    Raises:
        ValueError: A tensor is a scalar, or its elements do not lie in the order of its dimensions.
    """
    odd = [name for name, tensor in tensors.items() if tensor.dim() == 0]
    if odd:
        raise ValueError(f"sharded: {listed(odd)} have no dimension to cut along; make them of shape (1,)")
    odd = [name for name, tensor in tensors.items() if not tensor.is_contiguous()]
    if odd:
        raise ValueError(f"sharded: {listed(odd)} are not contiguous (channels_last?), as rows must be to be cut off")
    blocks = {
        name: torch.empty((-(-len(tensor) // world.size), *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    whole, layout = layout_of(tensors, hypers), layout_of(blocks, hypers)
    leaves = tuple(
        attrs.evolve(leaf, shape=_shortened(leaf.shape, rows(len(tensors[leaf.name]), world.rank, world.size)))
        for leaf in layout.leaves
    )
    elements = sum(torch.Size(leaf.shape).numel() for leaf in leaves)
    return Shards(world, whole, attrs.evolve(layout, leaves=leaves, elements=elements))


def _shortened(shape: tuple[int, ...], own: slice) -> tuple[int, ...]:
    return (own.stop - own.start, *shape[1:])


def mapped(tree: Any, function: Callable[[Flat], Any]) -> Any:
    """Replace the flat storage in a tree."""
    if isinstance(tree, Flat):
        return function(tree)
    if isinstance(tree, Mapping):
        return {name: mapped(child, function) for name, child in tree.items()}
    if isinstance(tree, tuple | list):
        return rebuilt(tree, [mapped(child, function) for child in tree])
    return tree
