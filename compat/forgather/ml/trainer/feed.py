"""Iterating a loader epoch by epoch, from any batch on, so that a run that goes on sees what it would have seen."""

import contextlib
import itertools
import random
from collections.abc import Callable, Generator, Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from forgather.ml.trainer.seeding import seed_worker
from forgather_fn.random import key, seeded

CPU = torch.device("cpu")


@attrs.define(eq=False)
class Rest:
    """The batches of indices of one epoch, from one of them on.

    A sampler that draws its order from the global generator gets a seed of the run and the epoch instead.

    Attributes:
        sampler: Gives the batches of indices of a whole epoch.
        seed: Of the run.
        numbered: Give each index as a pair with its epoch, for :class:`Keyed`.
        epoch: The next one.
        skip: How many batches of it are left out.
    """

    sampler: Any
    seed: int
    numbered: bool
    epoch: int = 0
    skip: int = 0

    def __iter__(self) -> Iterator[list[Any]]:
        with seeded(key(self.seed, "sampler", self.epoch), CPU):
            batches = iter(self.sampler)
            first = list(itertools.islice(batches, self.skip, self.skip + 1))
        for batch in itertools.chain(first, batches):
            yield [(self.epoch, index) for index in batch] if self.numbered else batch

    def __len__(self) -> int:
        return len(self.sampler)


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
        open: ``(epoch, skip) -> iterator`` over the batches of an epoch, less the first ``skip``.
    """

    loader: Any
    open: Callable[[int, int], Iterator[Any]]


def feed(loader: Any, seed: int) -> Feed:
    """Make a loader iterable from any batch on.

    A map-style torch loader is never asked for what is skipped; anything else is read and dropped.
    """
    plain = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
    if not plain or loader.batch_sampler is None:
        return Feed(loader, lambda epoch, skip: _read(loader, seed, epoch, skip))
    rest = Rest(loader.batch_sampler, seed, numbered=loader.num_workers > 0)
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

    def opened(epoch: int, skip: int) -> Iterator[Any]:
        set_epoch(loader, epoch)
        rest.epoch, rest.skip = epoch, skip
        return iter(mine)

    return Feed(loader, opened)


def _read(loader: Any, seed: int, epoch: int, skip: int) -> Generator[Any, None, None]:
    set_epoch(loader, epoch)
    if getattr(loader, "worker_init_fn", None) is seed_worker:  # a loader of ours: its workers draw by epoch
        loader.generator.manual_seed(key(seed, "workers", epoch))
    batches = iter(loader)
    for _ in itertools.islice(batches, skip):
        pass
    yield from batches


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
