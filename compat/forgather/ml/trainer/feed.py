"""Iterating a loader epoch by epoch, from any batch on, so that a run that goes on sees what it would have seen."""

import collections
import contextlib
import itertools
import random
from collections.abc import Callable, Generator, Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from forgather.ml.trainer.sampler import EpochSampler, LengthGroupedSampler
from forgather.ml.trainer.seeding import seed_worker
from forgather.ml.trainer.sharing import Sharing, whole
from forgather_fn.random import key, seeded

CPU = torch.device("cpu")
_ORDERED = (EpochSampler, LengthGroupedSampler, SequentialSampler)
"""Samplers that give all processes the same order; any other is read by the first process for all."""


@attrs.define(eq=False)
class Rest:
    """The batches of indices of one epoch, from one of them on.

    A sampler that draws its order from the global generator gets a seed of the run and the epoch instead.

    Attributes:
        sampler: Gives the batches of indices of a whole epoch.
        seed: Of the run.
        numbered: Give each index as a pair with its epoch, for :class:`Keyed`.
        sharing: Which of them this process has.
        stop: How many there are at most; None for all.
        epoch: The next one.
        skip: How many batches of it are left out.
    """

    sampler: Any
    seed: int
    numbered: bool
    sharing: Sharing
    stop: int | None = None
    epoch: int = 0
    skip: int = 0

    def __iter__(self) -> Iterator[list[Any]]:
        by_first = not (type(self.sampler) is BatchSampler and type(self.sampler.sampler) in _ORDERED)
        for batch in self.sharing.own(self._batches(), by_first=by_first):
            yield [(self.epoch, index) for index in batch] if self.numbered else batch

    def _batches(self) -> Iterator[list[Any]]:
        with seeded(key(self.seed, "sampler", self.epoch), CPU):
            batches = itertools.islice(self.sampler, self.skip, self.stop)
            first = list(itertools.islice(batches, 1))
        return itertools.chain(first, batches)

    def __len__(self) -> int:
        total = len(self.sampler)
        return self.sharing.count(total if self.stop is None else min(total, self.stop))


@attrs.define(eq=False)
class Keyed:
    """A dataset in worker processes, where what a sample draws at random depends on its epoch and index alone.

    Attributes:
        dataset: The user's.
        seed: Of the run.
    """

    dataset: Any
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        """Give what the dataset has: a worker_init_fn looks for it in ``get_worker_info().dataset``."""
        if name.startswith("__") or name == "dataset":  # it is being copied, or read from a pickle
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, indices: list[tuple[int, Any]]) -> list[Any]:
        """Fetch samples one by one, or together where the dataset can; then seed for the collator."""
        if hasattr(self.dataset, "__getitems__"):
            _reseed(self.seed, "fetch", *indices[0])
            samples = list(self.dataset.__getitems__([index for _, index in indices]))
        else:
            samples = []
            for epoch, index in indices:
                _reseed(self.seed, "sample", epoch, index)
                samples.append(self.dataset[index])
        _reseed(self.seed, "collate", *indices[0])
        return samples


def _reseed(seed: int, stream: str, epoch: int, index: Any) -> None:
    value = key(seed, stream, epoch, index if isinstance(index, int) else repr(index))
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)


@attrs.frozen(eq=False)
class Feed:
    """What a training iterates.

    Attributes:
        loader: The user's, or the trainer's own.
        open: ``(epoch, skip) -> iterator`` over the batches of an epoch that this process has, less those among the
            first ``skip`` of all.
    """

    loader: Any
    open: Callable[[int, int], Iterator[Any]]


def feed(loader: Any, seed: int, sharing: Sharing | None = None) -> Feed:
    """Make a loader iterable from any batch on.

    A map-style torch loader is never asked for what is skipped, nor for what other processes have; anything else is
    read and dropped, or read by the first process for all.

    Args:
        loader: Of all batches.
        seed: Of the run.
        sharing: Which batches this process has; None where there are no others. With it, what a batch draws at random
            while it is fetched depends on its number alone.
    """
    loader = whole(loader, 1 if sharing is None else sharing.world.size)
    if not _is_plain(loader) or (sharing is not None and sharing.dispatch):
        return Feed(loader, lambda epoch, skip: _read(loader, seed, sharing or Sharing(), epoch, skip))
    rest, mine = _rest(loader, seed, sharing or Sharing())

    def opened(epoch: int, skip: int) -> Iterator[Any]:
        set_epoch(loader, epoch)
        rest.epoch, rest.skip = epoch, skip
        if sharing is None or loader.num_workers:
            return iter(mine)
        return _drawn(iter(mine), sharing.own(itertools.count(skip)), seed, epoch)

    return Feed(loader, opened)


def own_batches(loader: Any, seed: int, sharing: Sharing, stop: int | None) -> tuple[Any, Iterator[Any]]:
    """Give the batches of a loader that this process has, one pass over them.

    Args:
        loader: Of all batches.
        seed: Of the run.
        sharing: Which of them this process has. What a batch draws at random depends on its number alone.
        stop: How many batches there are at most; None for all.

    Returns:
        A loader of them, for those who look at it, and its iterator.
    """
    loader = whole(loader, sharing.world.size)
    if not _is_plain(loader) or sharing.dispatch:
        return loader, sharing.own(itertools.islice(_opened(loader), stop), by_first=sharing.dispatch is not False)
    rest, mine = _rest(loader, seed, sharing)
    rest.stop = stop
    return mine, iter(mine) if loader.num_workers else _drawn(iter(mine), sharing.own(itertools.count()), seed, 0)


def _is_plain(loader: Any) -> bool:
    plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    return plain and loader.batch_sampler is not None


def _rest(loader: Any, seed: int, sharing: Sharing) -> tuple[Rest, DataLoader[Any]]:
    """Make a loader like the one given, of the batches of indices that :class:`Rest` gives."""
    rest = Rest(loader.batch_sampler, seed, numbered=loader.num_workers > 0, sharing=sharing)
    dataset: Any = Keyed(loader.dataset, seed) if loader.num_workers else loader.dataset
    mine: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=rest,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(key(seed, "workers")),
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )
    return rest, mine


def _drawn(batches: Iterator[Any], numbers: Iterator[int], seed: int, epoch: int) -> Generator[Any, None, None]:
    """Fetch each batch under a key of its number, and leave the global generators as they are."""
    for number in numbers:
        with _drawing(seed, "batch", epoch, number):
            fetched = list(itertools.islice(batches, 1))
        if not fetched:
            return
        yield fetched[0]


@contextlib.contextmanager
def _drawing(seed: int, stream: str, epoch: int, number: int) -> Iterator[None]:
    """Run a block under a key of its own, and leave the global generators as they are."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    _reseed(seed, stream, epoch, number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


def _read(loader: Any, seed: int, sharing: Sharing, epoch: int, skip: int) -> Iterator[Any]:
    set_epoch(loader, epoch)
    if getattr(loader, "worker_init_fn", None) is seed_worker:  # a loader of ours: its workers draw by epoch
        loader.generator.manual_seed(key(seed, "workers", epoch))
    batches, by_first = _in_order(loader, seed, epoch), sharing.dispatch is not False

    def passed_over() -> None:
        collections.deque(itertools.islice(batches, skip), maxlen=0)

    # At once: what is skipped may draw, and whoever goes on puts the generators back before the next batch.
    sharing.world.first(passed_over) if by_first else passed_over()
    return sharing.own(batches, by_first=by_first)


def _in_order(loader: Any, seed: int, epoch: int) -> Generator[Any, None, None]:
    """Iterate a loader whose order, which it draws before its first batch, depends on seed and epoch alone."""
    with _drawing(seed, "order", epoch, 0):
        batches = iter(loader)
        first = list(itertools.islice(batches, 1))
    yield from first
    yield from batches


def _opened(loader: Any) -> Iterator[Any]:
    """Begin to iterate a loader when its first batch is asked for: not before, and not where nobody asks."""
    yield from loader


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader, its samplers and its dataset which epoch comes, as far as they want to know."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    inner = getattr(batch_sampler, "batch_sampler", None)
    told = [loader, getattr(loader, "sampler", None), batch_sampler, inner, getattr(batch_sampler, "sampler", None)]
    told.append(getattr(loader, "dataset", None))
    seen: set[int] = set()
    for one in told:
        if one is not None and id(one) not in seen and callable(getattr(one, "set_epoch", None)):
            seen.add(id(one))
            with contextlib.suppress(NotImplementedError):
                one.set_epoch(epoch)


def closing(batches: Any) -> Any:
    """End a generator with the block; other iterators have nothing to end."""
    return contextlib.closing(batches) if hasattr(batches, "close") else contextlib.nullcontext()
