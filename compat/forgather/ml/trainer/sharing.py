"""Which batches of a loader a process has: a block of each step's, so that a step is the same on one process and many.

Accelerate gives process ``r`` the batches ``r``, ``r + W``, ...; a step then consumes the same batches, only the
processes that run them are others.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import attrs
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from forgather_fn.share import Share
from forgather_fn.world import ALONE, World

T = TypeVar("T")


@attrs.frozen(eq=False)
class Sharing:
    """How the batches of a loader are shared out.

    Attributes:
        world: The processes.
        share: Which batches of a window this process has; a window is what a step, or a round of an evaluation, takes.
        dispatch: Whether the first process reads for all, and the others nothing. If not, each reads its own, and
            everything where no index can be given (of an iterable). None: the first reads such data, and no other.
    """

    world: World = ALONE
    share: Share = attrs.field(factory=lambda: Share(1))
    dispatch: bool | None = None

    def own(self, items: Iterable[T], *, by_first: bool = False) -> Iterator[T]:
        """Take this process's block of each window of a sequence.

        Args:
            items: All of them, in order. Where the first process reads for all, the others do not touch it.
            by_first: Let the first process read for all. All must then ask for the next item equally often.
        """
        size, block = self.share.microbatches, self.share.block
        alone = not by_first or self.world.size == 1
        source = iter(items) if alone or self.world.main else iter(())
        while True:
            window = list(itertools.islice(source, size)) if alone else self.world.first(lambda: _read(source, size))
            yield from window[block.start : block.stop]
            if len(window) < size:
                return

    def count(self, total: int) -> int:
        """Count this process's among so many batches."""
        whole, rest = divmod(total, self.share.microbatches)
        return whole * len(self.share.block) + len(range(rest)[self.share.block.start : self.share.block.stop])


def _read(source: Iterator[T], size: int) -> list[T]:
    return list(itertools.islice(source, size))


def whole(loader: Any, size: int) -> Any:
    """Take a loader of a user, as it is on one process, where Accelerate has shared it out, or wrapped it, already.

    Args:
        loader: Of all batches, or what ``accelerator.prepare`` made of it.
        size: How many processes there are. One keeps a loader that is not of batches of indices as it is.

    Raises:
        ValueError: It gives each process batches of its own, and what it would give one process is not to be had.
    """
    sampler: Any = getattr(loader, "batch_sampler", None)
    inner = getattr(sampler, "sampler", None)
    distributed = isinstance(inner, DistributedSampler) or isinstance(
        getattr(loader, "sampler", None), DistributedSampler
    )
    if distributed and size > 1:
        raise ValueError(
            "the loader has a DistributedSampler, and the trainer shares batches out itself, so that each process "
            "would see a part of its part. Leave the sampler out: DataLoader(dataset, batch_size=..., shuffle=True)"
        )
    if not type(loader).__module__.startswith("accelerate."):
        return loader
    shared = type(sampler).__name__ == "BatchSamplerShard"
    wrapped = type(loader).__name__ == "DataLoaderShard" and not isinstance(loader.dataset, IterableDataset)
    if shared or (size == 1 and wrapped and sampler is not None):
        return DataLoader(
            loader.dataset,
            batch_sampler=sampler.batch_sampler if shared else sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )
    if size == 1:
        return loader
    raise ValueError(
        f"Accelerate has made a {type(loader).__name__} of the loader, which gives each process batches of its own, "
        "and the trainer shares batches out itself: return the DataLoader without accelerator.prepare(...)"
    )
