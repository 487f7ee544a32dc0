"""What a run is trained on: a sequence of batches that can be started where a state says."""

import abc
from collections.abc import Generator
from typing import Any, Final, Literal, NoReturn, TypeAlias

from forgather_fn.data.batch import Batch
from forgather_fn.share import Share

Last: TypeAlias = Literal["span", "ragged", "drop"]

VERSION: Final = 1
"""Part of every fingerprint. To be raised when the same stream would give other samples, or other random draws."""


class Stream(abc.ABC):
    """An endless or bounded sequence of batches, not yet started; made by :func:`~forgather_fn.data.batching.batches`.

    A stream has no position: ``start`` may be called any number of times, for any position.
    :class:`~forgather_fn.data.indexed.IndexedStream` finds its samples by number, and starts anywhere at the same cost;
    :class:`~forgather_fn.data.iterated.IteratedStream` reads a source that can be read only one after the other.

    Attributes:
        batch_size: Samples in a batch, for the whole step: all microbatches of all ranks; or the schedule of it.
    """

    __slots__ = ()

    batch_size: Any

    @property
    @abc.abstractmethod
    def epoch_length(self) -> int | None:
        """Samples that one epoch consumes; None if it is not known before it is over."""

    @property
    @abc.abstractmethod
    def total_samples(self) -> int | None:
        """Samples that the whole stream consumes; None if it is endless, or that is not known."""

    @property
    @abc.abstractmethod
    def least(self) -> int | None:
        """Samples in the smallest batch, but for one that ends an epoch or the stream; None if it is not known."""

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "a stream has no beginning of its own, so `for batch in stream` says too little: write "
            "`for batch in stream.start(seed=0, samples=0)`, or `for tick in program.steps(state, stream)`"
        )

    @abc.abstractmethod
    def start(
        self, seed: int, samples: int, share: Share | None = None, *, cursor: str | None = None
    ) -> Generator[Batch, None, None]:
        """Give the batches from a position on. Close the iterator to end its workers, which also end with it.

        Args:
            seed: The job's. A ``seed`` given to :func:`~forgather_fn.data.batching.batches` takes its place.
            samples: Samples of this stream that the job has consumed.
            share: Which microbatches this process has: each is collated by itself, and the data of a batch are
                :class:`~forgather_fn.share.Microbatches`; its number of samples is that of the whole step. None: all of
                them, collated at once.
            cursor: That of the last batch, for a stream whose batches have one.

        Raises:
            ValueError: There is no such position.
        """

    @abc.abstractmethod
    def one_pass(self, rank: int = 0, size: int = 1) -> Generator[Batch, None, None]:
        """Give every sample once, as an evaluation wants them; the last batch may be smaller.

        Args:
            rank: Of ``size`` processes, each takes one batch in turn; this one starts with batch ``rank``.
            size: How many share the pass.
        """

    @abc.abstractmethod
    def count(self, start: int, stop: float) -> int | None:
        """Count the batches that lead from one position to another, or first beyond it; None if it is not known."""

    @abc.abstractmethod
    def fingerprint(self, seed: int, share: Share | None = None) -> str:
        """Name everything that decides which samples come when, and what they draw, in one line.

        Two streams over the same data with the same fingerprint give the same samples. How they are fetched (workers,
        threads, prefetching, pinning) and how many there are (``epochs``) is left out; so is the batch size, where only
        the boundaries between batches depend on it.

        Args:
            seed: The job's. A ``seed`` given to :func:`~forgather_fn.data.batching.batches` takes its place.
            share: As in :meth:`start`; which process it is makes no difference.
        """
