"""One pass over the data of an evaluation by several processes, and whether all have been given the same."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs
import torch

from forgather_fn.alike import EXACT, content, same
from forgather_fn.batch import as_batch, check_batches
from forgather_fn.data import Stream
from forgather_fn.data.indexed import IndexedStream
from forgather_fn.fingerprint import number_of
from forgather_fn.world import World, check_same


@attrs.frozen
class Read:
    """What one process has read, and for what.

    Attributes:
        what: It was read for, and how much it was: the same text on all processes.
        first: Numbers for the first of all batches, as of :func:`~forgather_fn.alike.numbers`; None if it was not read.
    """

    what: str
    first: tuple[float, float, float] | None

    def __str__(self) -> str:
        return f"{self.what}, the first with the numbers {self.first}"


@attrs.define(eq=False)
class Pass:
    """One pass over the data of an evaluation: the processes of a world take its batches in turn.

    Attributes:
        data: A stream, of which a process reads only its own batches and the first, or an iterable of batches.
        world: The processes.
        device: Where batches may be, besides the CPU.
    """

    data: Any
    world: World
    device: torch.device
    _count: int = 0
    _first: tuple[float, float, float] | None = None

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Give the batches that are this process's, with their numbers."""
        rank, size, data = self.world.rank, self.world.size, self.data
        if isinstance(data, IndexedStream):
            for number, batch in zip(itertools.count(rank, size), data.one_pass(rank, size), strict=False):
                if batch.witness is not None:
                    self._first = float(number_of(batch.witness) & EXACT), 0.0, 0.0
                yield number, batch
            return
        if not isinstance(data, Stream):
            check_batches(data)
        for number, batch in enumerate(data.one_pass() if isinstance(data, Stream) else data):
            if not number and size > 1:
                whole, floating = content(as_batch(batch).data, self.device)
                self._first = 0.0, float(whole), float(floating)
            self._count += 1
            if number % size == rank:
                yield number, batch

    def read(self, what: str) -> Read:
        """Tell what was read, for what."""
        if isinstance(self.data, IndexedStream):
            return Read(f"{what}; {self.data.fingerprint(0)} batch_size={self.data.batch_size}", self._first)
        return Read(f"{what}; {self._count} batches", self._first)


def check_alike(told: Sequence[Read]) -> None:
    """Make sure that all processes have read the same, for the same.

    Raises:
        ValueError: They have not, which all of them find.
    """
    firsts = [one.first for one in told if one.first is not None]
    if len({one.what for one in told}) > 1 or (firsts and not same(torch.tensor(firsts, dtype=torch.float64))):
        check_same([str(one) for one in told], _UNLIKE)


_UNLIKE: Final = (
    "evaluate: the processes of a run must be given the same state and the same data, of which each takes some "
    "batches; seed what draws, splits or shuffles them. They were given:"
)
