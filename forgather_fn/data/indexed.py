"""Streams whose only state is an integer: how many samples were consumed."""

import contextlib
import itertools
import math
from collections.abc import Generator, Iterator
from typing import Any, Final

import attrs
import numpy as np
import torch

from forgather_fn.data.batch import Batch, digest
from forgather_fn.data.fetch import Collate, Indices, Source
from forgather_fn.data.loading import Fetch, Request, in_process, in_workers, keyed, undrawn
from forgather_fn.data.order import Order, Ordering, look_up
from forgather_fn.data.sizes import Sizes
from forgather_fn.data.stream import VERSION, Last, Stream
from forgather_fn.data.threads import in_threads
from forgather_fn.describe import describe
from forgather_fn.share import Microbatches, Share

_BLOCK: Final = 8192
"""Positions looked up at once: a look-up of one batch costs as much as one of thousands of samples."""


@attrs.frozen(eq=False, repr=False)
class IndexedStream(Stream):
    """Batches of samples that are found by their number: which one comes when is algebra on positions.

    It starts at any position at the same cost.

    Attributes:
        dataset: As given.
        length: Samples in the dataset when the stream was made.
        batch_size: Samples in a batch, for the whole step: all microbatches of all ranks; or the schedule of it.
        order, last, collate, epochs, workers, threads, prefetch, pin_memory, random, seed: As given to
            :func:`~forgather_fn.data.batching.batches`.
    """

    dataset: Any
    length: int
    batch_size: int | Sizes
    order: Order | Ordering
    last: Last
    collate: Collate | None
    epochs: int | None
    workers: int
    threads: int
    prefetch: int
    pin_memory: bool
    random: bool
    seed: int | None
    _source: Source = attrs.field(alias="source")

    @property
    def epoch_length(self) -> int:
        """Samples that one epoch consumes: the dataset's, less the tail that ``last="drop"`` leaves out."""
        if self.last != "drop":
            return self.length
        assert isinstance(self.batch_size, int)
        return self.length - self.length % self.batch_size

    @property
    def total_samples(self) -> int | None:
        """Samples that the whole stream consumes, None if it is endless."""
        return None if self.epochs is None else self.epochs * self.epoch_length

    @property
    def least(self) -> int | None:
        """Samples in the smallest batch, but for one that ends an epoch or the stream; None if it is not known."""
        return self.batch_size if isinstance(self.batch_size, int) else self.batch_size.least

    def start(
        self, seed: int, samples: int, share: Share | None = None, *, cursor: str | None = None
    ) -> Generator[Batch, None, None]:
        """Give the batches from a position on.

        The cost does not depend on the position: nothing is skipped or replayed. Close the iterator to end its workers
        (they also end with it, and with the process).

        Args:
            seed: The job's. A ``seed`` given to :func:`batches` takes its place.
            samples: Samples of this stream that the job has consumed.
            share: Which microbatches this process has. Only their samples are read, each microbatch is collated by
                itself, and the data of a batch are :class:`~forgather_fn.share.Microbatches`; its number of samples is
                that of the whole step. None: all, collated at once.
            cursor: None: the number of samples says it all.

        Raises:
            ValueError: ``samples`` is negative; or it lies inside a batch, with ``last="drop"``, where all batches are
                full, or with a schedule of the batch size; or there is a cursor. From the iterator: the dataset's
                length has changed, or the first batch drew random numbers without ``random=True``.
        """
        if samples < 0:
            raise ValueError(f"samples={samples}: a stream starts at position 0 or later")
        if cursor is not None:
            raise ValueError(
                "a cursor belongs to a source that is read one sample after the other; the samples of this dataset are "
                "found by their number. Was the job trained on another stream? attrs.evolve(state, data=None, "
                "cursor=None, samples=0) starts it anew on this one."
            )
        if isinstance(self.batch_size, Sizes):
            self.batch_size.at(samples)
        elif self.last == "drop" and samples % self.batch_size:
            raise ValueError(
                f"samples={samples} lies inside a batch: with last='drop' and batch_size={self.batch_size} a stream "
                f"starts at a multiple of {self.batch_size}. Was the position reached with another batch size?"
            )
        return self._batches(self._seed(seed), samples, share)

    def one_pass(self, rank: int = 0, size: int = 1) -> Generator[Batch, None, None]:
        """Give every sample of the dataset once, in its order, as an evaluation wants them.

        The last batch may be ragged, whatever ``order``, ``last`` and ``epochs`` say of training. Random draws are
        those of epoch 0 under the seed given to :func:`batches`, or 0: the same in every pass.

        Args:
            rank: Of ``size`` processes, each takes one batch in turn; this one starts with batch ``rank``.
            size: How many share the pass.
        """
        once = attrs.evolve(self, order="sequential", last="ragged", epochs=1)
        return once._batches(once._seed(0), 0, None, rank, size)

    def indices(self, seed: int, start: int, stop: int) -> tuple[Indices, Indices]:
        """Look up which samples lie at the positions ``start <= i < stop`` of a job.

        A pure function, for any range and in any order; ``order="torch"`` keeps the last epoch that was looked up
        (8 bytes a sample), and makes others anew.

        Args:
            seed: The job's. A ``seed`` given to :func:`batches` takes its place.
            start: The first position, in samples.
            stop: The position after the last. The end of a bounded stream is not looked at.

        Returns:
            The epoch and the dataset index of each position, both int64, shape (stop - start,).

        Raises:
            ValueError: Not ``0 <= start <= stop``.

        Example:
            >>> from forgather_fn import batches
            >>> stream = batches(range(3), batch_size=2, order="sequential")
            >>> [part.tolist() for part in stream.indices(0, 2, 7)]
            [[0, 1, 1, 1, 2], [2, 0, 1, 2, 0]]
        """
        return look_up(self.order, start, stop, n=self.length, epoch_length=self.epoch_length, seed=self._seed(seed))

    def count(self, start: int, stop: float) -> int:
        """Count the batches that lead from one position to another, or first beyond it.

        Example:
            >>> from forgather_fn import batches
            >>> batches(range(10), batch_size=4, last="ragged").count(0, 20)
            6
        """
        if stop <= start:
            return 0
        if isinstance(self.batch_size, Sizes):
            return self.batch_size.steps(math.ceil(stop)) - self.batch_size.steps(start)
        if self.last != "ragged" or start // self.length == stop // self.length:
            return math.ceil((stop - start) / self.batch_size)
        first, rest = self.length - start % self.length, stop % self.length
        epochs = int(stop // self.length) - start // self.length - 1
        return sum(math.ceil(part / self.batch_size) for part in (first, rest)) + epochs * math.ceil(
            self.length / self.batch_size
        )

    def fingerprint(self, seed: int, share: Share | None = None) -> str:
        """Name everything that decides which samples come when, and what they draw, in one line.

        Two streams over the same data with the same fingerprint give the same samples. How they are fetched (workers,
        prefetching, pinning) and how many there are (``epochs``) is left out; so is the batch size, where only the
        boundaries between batches depend on it.

        Args:
            seed: The job's. A ``seed`` given to :func:`batches` takes its place.
            share: As in :meth:`start`; which process it is makes no difference.

        Example:
            >>> from forgather_fn import batches
            >>> batches(range(10), batch_size=2).fingerprint(seed=7)
            'data/1 length=10 order=shuffled last=span random=False seed=7'
        """
        parts = [f"data/{VERSION}", f"length={self.length}", f"order={self.order}", f"last={self.last}"]
        if self.last == "drop" or (self.random and self._source.joint):
            parts.append(f"batch_size={self.batch_size}")
        if share is not None and self.random and self._source.joint:
            parts.append(f"microbatches={share.microbatches}")
        parts.append(f"random={self.random}")
        if self.order != "sequential" or self.random:
            parts.append(f"seed={self._seed(seed)}")
        return " ".join(parts)

    def __repr__(self) -> str:
        # Never the dataset's own text: that of a list of tensors takes a second to make.
        dataset = f"<{type(self.dataset).__name__} of {self.length} samples>"
        names = [field.name for field in attrs.fields(IndexedStream)[2:-1]]
        return f"batches({', '.join([dataset, *(f'{name}={describe(getattr(self, name))}' for name in names)])})"

    def _seed(self, seed: int) -> int:
        return int(seed if self.seed is None else self.seed)  # a numpy integer would print, and hash, as another

    def _batches(
        self, seed: int, samples: int, share: Share | None, rank: int = 0, size: int = 1
    ) -> Generator[Batch, None, None]:
        """Fetch microbatches of each batch, or every so many-th batch; and what all processes read, to compare it."""
        requests = self._requests(seed, samples)
        first = next(requests, None)
        if first is None:
            return
        common = _common(first, share, rank)
        compared = size > 1 or (share is not None and share.size > 1)
        chosen = itertools.islice(itertools.chain([first], requests), rank, None, size)
        requests, asked = itertools.tee(chosen)
        parts = itertools.chain(common, (part for request in asked for part in _parts(request, share)))
        fetch = Fetch(self._source.read, keyed if self.random else undrawn)
        pin_memory = self.pin_memory and torch.accelerator.is_available()
        each = 1 if share is None else len(share.block)
        prefetch = self.prefetch * each
        if self.workers:
            answers = in_workers(
                fetch, parts, workers=self.workers, prefetch=prefetch, pin_memory=pin_memory, seed=seed
            )
        elif self.threads:
            answers = in_threads(fetch, parts, threads=self.threads, prefetch=prefetch, pin_memory=pin_memory)
        else:
            answers = in_process(fetch, parts, pin_memory=pin_memory)
        with contextlib.closing(answers):
            known = [data for _, data in itertools.islice(answers, len(common))]
            for request in requests:
                count = len(request.indices)
                own = [data for _, data in itertools.islice(answers, len(_parts(request, share)))]
                witness = digest((*known, *own)[0]) if compared else None
                compared = False
                data = own[0] if share is None else Microbatches(tuple(own), share.block.start)
                ragged = count < self._size(request.start)
                if share is not None:
                    share.check(count, ragged=ragged)
                yield Batch(
                    data,
                    count,
                    request.indices,
                    ragged=ragged,
                    varies=self._varies,
                    position=request.start,
                    witness=witness,
                )

    @property
    def _varies(self) -> bool:
        if self.last == "ragged" or isinstance(self.batch_size, Sizes):
            return True
        return self.total_samples is not None and self.total_samples % self.batch_size > 0

    def _size(self, position: int) -> int:
        return self.batch_size if isinstance(self.batch_size, int) else self.batch_size.at(position)

    def _requests(self, seed: int, samples: int) -> Iterator[Request]:
        """Look up a block of positions, cut it into batches, and go on with the next."""
        epochs = indices = np.empty(0, np.int64)
        position = looked_up = block = samples
        while self.total_samples is None or position < self.total_samples:
            self._check_length(position)
            epoch_end = (position // self.epoch_length + 1) * self.epoch_length
            stop = position + self._size(position)
            if self.last == "ragged":
                stop = min(stop, epoch_end)
            if self.total_samples is not None:
                stop = min(stop, self.total_samples)
            if stop > looked_up:
                block, looked_up = position, max(stop, min(position + _BLOCK, epoch_end))
                epochs, indices = self.indices(seed, block, looked_up)
            rows = slice(position - block, stop - block)
            yield Request(position, epochs[rows], indices[rows], seed, first=position == samples)
            position = stop

    def _check_length(self, position: int) -> None:
        length = len(self._source.sized)
        if length != self.length:
            raise ValueError(
                f"the dataset has {length} samples, but had {self.length} when batches() was called (seen at sample "
                f"{position} of the job), and the order depends on its length: change it only between streams."
            )


def _parts(request: Request, share: Share | None) -> list[Request]:
    if share is None:
        return [request]
    return [request.rows(rows, first=i == 0) for i, rows in enumerate(share.rows(len(request.indices)))]


def _common(first: Request, share: Share | None, rank: int) -> list[Request]:
    """Ask, besides, for what the first process begins with: its first microbatch, or its first batch."""
    if share is None:
        return [first] if rank else []
    return _parts(first, attrs.evolve(share, rank=0))[:1] if share.rank else []
