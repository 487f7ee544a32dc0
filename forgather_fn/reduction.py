"""Sums over the microbatches of a process, and over processes.

The ordinary sum is torch's all-reduce. A *tree* adds in pairs, aligned to powers of two, over the microbatches of the
whole step: locally as a binary counter adds, across processes by recursive doubling. Where each process has a power of
two of them, the same pairs are added whatever the number of processes, so the sum has the same bits.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import attrs
import torch
from torch import Tensor

from forgather_fn.world import World

Reduction = Literal["sum", "tree"]


class Reduce(Protocol):
    """Add tensors up over processes."""

    def __call__(self, tensors: Sequence[Tensor], /) -> None:
        """Leave in each tensor, on every process, the sum of those of all processes."""
        ...


def all_reduced(world: World) -> Reduce:
    """Add by torch's all-reduce, all tensors at a time."""

    def reduce(tensors: Sequence[Tensor], /) -> None:
        from torch import distributed

        with world.explained():
            works: list[Any] = [distributed.all_reduce(t, group=world.group, async_op=True) for t in tensors]
            for work in works:
                work.wait()

    return reduce if world.size > 1 else _nothing


def doubled(world: World) -> Reduce:
    """Add by recursive doubling: in round k with the process whose rank differs in bit k.

    Raises:
        ValueError: The number of processes is not a power of two.
    """
    if world.size & (world.size - 1):
        raise ValueError(
            f'reduction="tree" adds in pairs, and needs a power of two of processes, not {world.size}; use '
            'reduction="sum"'
        )

    def reduce(tensors: Sequence[Tensor], /) -> None:
        from torch import distributed

        received = [torch.empty_like(tensor) for tensor in tensors]
        with world.explained():
            for distance in (1 << k for k in range(world.size.bit_length() - 1)):
                peer = world.rank ^ distance
                for work in distributed.batch_isend_irecv(
                    [distributed.P2POp(distributed.isend, t, group=world.group, group_peer=peer) for t in tensors]
                    + [distributed.P2POp(distributed.irecv, t, group=world.group, group_peer=peer) for t in received]
                ):
                    work.wait()
                for mine, other in zip(tensors, received, strict=True):
                    mine.add_(other)  # addition commutes, so who is first makes no difference to the bits

    return reduce if world.size > 1 else _nothing


def _nothing(tensors: Sequence[Tensor], /) -> None:
    del tensors


@attrs.define(eq=False)
class Counter:
    """Adds up tensors one after the other, in aligned pairs: a binary counter whose digits are partial sums."""

    digits: list[tuple[int, list[Tensor]]] = attrs.field(factory=list)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Take the tensors of the next microbatch; they are copied."""
        level, held = 0, [tensor.clone() for tensor in tensors]
        while self.digits and self.digits[-1][0] == level:
            _, lower = self.digits.pop()
            level, held = level + 1, _added(lower, held)
        self.digits.append((level, held))

    def take(self, buffers: Sequence[Tensor]) -> None:
        """Add what buffers hold, and make them ready for the next microbatch."""
        self.add(buffers)
        for buffer in buffers:
            buffer.zero_()

    def leave(self, buffers: Sequence[Tensor]) -> None:
        """Write the sum of all into buffers."""
        for buffer, total in zip(buffers, self.total(buffers), strict=True):
            buffer.copy_(total)

    def total(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Give the sum of all; nothing is the number that changes no other, of the shapes of ``like``."""
        if not self.digits:
            return [torch.full_like(tensor, -0.0) for tensor in like]  # 0.0 would turn -0.0 into itself
        held = self.digits.pop()[1]
        while self.digits:
            held = _added(self.digits.pop()[1], held)
        return held


def _added(lower: list[Tensor], higher: list[Tensor]) -> list[Tensor]:
    for one, other in zip(lower, higher, strict=True):
        one.add_(other)
    return lower
