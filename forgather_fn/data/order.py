"""The order of the samples: algebra on positions, nothing drawn and nothing stored."""

import functools
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
import torch

from forgather_fn.data.fetch import Indices
from forgather_fn.data.permutation import permuted
from forgather_fn.random import key

Order: TypeAlias = Literal["shuffled", "torch", "sequential"]


class Permute(Protocol):
    """The order of one epoch: a permutation of ``range(n)`` for each seed and epoch."""

    def __call__(self, offsets: Indices, /, *, n: int, seed: int, epoch: int) -> Indices:
        """Map offsets in the epoch, int64 in ``[0, n)``, to dataset indices."""
        ...


class Ordering(Protocol):
    """An order of another kind, over positions of the whole job; its text is part of the stream's fingerprint."""

    def look_up(self, start: int, stop: int, /, *, n: int, epoch_length: int, seed: int) -> tuple[Indices, Indices]:
        """Find the samples at the positions ``start <= i < stop``, as :func:`look_up` does: a pure function."""
        ...

    def epoch_ranges(self, n: int, /) -> list[range]:
        """Cut ``range(n)`` into what has epochs of its own: none of its samples comes again before all have come."""
        ...


def shuffled(offsets: Indices, /, *, n: int, seed: int, epoch: int) -> Indices:
    """Shuffle in constant memory."""
    return permuted(offsets, n=n, key=key(seed, "data", epoch))


def as_torch(offsets: Indices, /, *, n: int, seed: int, epoch: int) -> Indices:
    """Shuffle as the default sampler of transformers.Trainer does."""
    return _randperm(n, seed + epoch)[offsets]


def sequential(offsets: Indices, /, *, n: int, seed: int, epoch: int) -> Indices:
    """Keep the dataset's own order."""
    return offsets


@functools.lru_cache(maxsize=1)  # one epoch is in use at a time, and may be large
def _randperm(n: int, seed: int) -> Indices:
    permutation: Indices = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    return permutation


ORDERS: Final[dict[Order, Permute]] = {"shuffled": shuffled, "torch": as_torch, "sequential": sequential}


def look_up(
    order: Order | Ordering, start: int, stop: int, *, n: int, epoch_length: int, seed: int
) -> tuple[Indices, Indices]:
    """Find the samples at the positions ``start <= i < stop`` of a job.

    Args:
        order: Of each epoch.
        start: The first position, in samples from the start of the job.
        stop: The position after the last.
        n: Samples in the dataset.
        epoch_length: Samples that an epoch consumes: its first ones, if they are fewer than ``n``.
        seed: The data seed.

    Returns:
        The epoch and the dataset index of each position, both int64 of shape (stop - start,).

    Raises:
        ValueError: Not ``0 <= start <= stop``.

    Example:
        >>> epochs, indices = look_up("sequential", 2, 7, n=3, epoch_length=3, seed=0)
        >>> epochs.tolist(), indices.tolist()
        ([0, 1, 1, 1, 2], [2, 0, 1, 2, 0])
    """
    if not 0 <= start <= stop:
        raise ValueError(f"positions from {start} to {stop}: expected 0 <= start <= stop")
    if not isinstance(order, str):
        return order.look_up(start, stop, n=n, epoch_length=epoch_length, seed=seed)
    epochs, indices = np.divmod(np.arange(start, stop, dtype=np.int64), np.int64(epoch_length))
    for epoch in range(start // epoch_length, -(-stop // epoch_length)):
        first = epoch * epoch_length
        part = slice(max(first - start, 0), first + epoch_length - start)
        indices[part] = ORDERS[order](indices[part], n=n, seed=seed, epoch=epoch)
    return epochs, indices
