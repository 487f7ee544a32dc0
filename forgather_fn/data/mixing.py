"""Mixtures of datasets: which source a sample of the job comes from is a function of its position."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

import attrs
import numpy as np
from torch.utils.data import default_collate

from forgather_fn.data.fetch import Collate, Given, Indices, Reseed, Samples, Source, collated, samples_of
from forgather_fn.data.order import Order, Ordering, look_up
from forgather_fn.data.permutation import permuted
from forgather_fn.data.weights import Curriculum, Phases, phases
from forgather_fn.random import key
from forgather_fn.signature import checked, shown

WINDOW: Final = 1024
"""Positions whose sources are shuffled together. Each window has its exact number of samples of each source."""


@attrs.frozen(eq=False)
class Mixture:
    """Several datasets as one; made by :func:`mixture`, for :func:`~forgather_fn.data.batching.batches`.

    Its samples are numbered through, source by source.

    Attributes:
        names: Of the sources.
        lengths: Samples in each.
        weights: How many samples each gives up to any position.
        label: The key under which a sample has the number of its source; None for none.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    weights: Phases
    label: str | None
    _given: tuple[Given, ...] = attrs.field(alias="given")

    def __len__(self) -> int:
        return sum(len(given.sized) for given in self._given)

    @property
    def offsets(self) -> Indices:
        """The number of the first sample of each source, and of all samples: int64, shape (sources + 1,)."""
        return np.cumsum([0, *self.lengths])

    def source_of(self, indices: Indices) -> Indices:
        """Tell which source samples are of: its place among the names, int64."""
        return np.searchsorted(self.offsets, indices, side="right") - 1

    def source(self, collate: Collate | None) -> Source:
        """Say how a batch is read: samples of all sources, then one collate function for all."""
        joint = collate is not None or any(given.joint for given in self._given)
        samples = Gathered(self.names, self.offsets, self.label, tuple(given.samples for given in self._given))
        return Source(partial(collated, samples, collate or default_collate), self, joint)

    def ordering(self, order: Order | Ordering) -> "Order | Ordering":
        """Say which sample comes when, given the order of each source.

        Raises:
            ValueError: The order is not one of the named ones.
        """
        if not isinstance(order, str):
            raise ValueError(f"order={order}: the sources of a mixture take 'shuffled', 'torch' or 'sequential'")
        return Mixed(self.names, self.lengths, self.weights, order)


@attrs.frozen(eq=False)
class Gathered:
    """Fetches samples source by source; this is what goes to worker processes."""

    names: tuple[str, ...]
    offsets: Indices
    label: str | None
    sources: tuple[Samples, ...]

    def __call__(self, indices: Indices, reseed: Reseed, /) -> list[Any]:
        """Give samples in the order that is asked for."""
        found: list[Any] = [None] * len(indices)
        of = np.searchsorted(self.offsets, indices, side="right") - 1
        for number in np.unique(of).tolist():
            rows = np.flatnonzero(of == number)

            def reseed_row(stream: str, row: int, /, rows: Indices = rows) -> None:
                reseed(stream, int(rows[row]))

            samples = self.sources[number](indices[rows] - self.offsets[number], reseed_row)
            for row, sample in zip(rows.tolist(), samples, strict=True):
                found[row] = sample if self.label is None else self._labelled(sample, number)
        return found

    def _labelled(self, sample: Any, number: int) -> Any:
        if not isinstance(sample, Mapping) or self.label in sample:
            have = sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__
            raise ValueError(
                f"label={self.label!r}: the number of its source is put into each sample under this key, but a sample "
                f"of {self.names[number]!r} is {have}. Give samples that are mappings without it, or label=None."
            )
        return {**sample, self.label: number}


@attrs.frozen(repr=False)
class Mixed:
    """The order of a mixture."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    weights: Phases = attrs.field(eq=False)
    order: Order

    def look_up(self, start: int, stop: int, /, *, n: int, epoch_length: int, seed: int) -> tuple[Indices, Indices]:
        """Find the samples at positions; the epoch is that of the sample's own source."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions from {start} to {stop}: expected 0 <= start <= stop")
        sources, numbers = (np.empty(stop - start, np.int64) for _ in range(2))
        for first, own_sources, own_numbers in self._windows(start, stop, seed):
            into = slice(max(first, start) - start, min(first + len(own_sources), stop) - start)
            part = slice(into.start + start - first, into.stop + start - first)
            sources[into], numbers[into] = own_sources[part], own_numbers[part]
        epochs, indices = np.empty_like(numbers), np.empty_like(numbers)
        offset = 0
        for number, (name, length) in enumerate(zip(self.names, self.lengths, strict=True)):
            rows = np.flatnonzero(sources == number)
            if rows.size:  # the numbers of one source follow each other
                begin, own = int(numbers[rows[0]]), key(seed, "mixture", name) % 2**62
                epochs[rows], found = look_up(
                    self.order, begin, begin + rows.size, n=length, epoch_length=length, seed=own
                )
                indices[rows] = found + offset
            offset += length
        return epochs, indices

    def epoch_ranges(self, n: int, /) -> list[range]:
        """Give the samples of each source: they have epochs of their own."""
        stops = np.cumsum(self.lengths).tolist()
        return [range(stop - length, stop) for stop, length in zip(stops, self.lengths, strict=True)]

    def _windows(self, start: int, stop: int, seed: int) -> Iterator[tuple[int, Indices, Indices]]:
        """For each window that has some of the positions, give its first, and source and number of each of its own."""
        position = start
        while position < stop:
            phase, end = self.weights.at(position)
            first = position - (position - phase.start) % WINDOW
            last = int(min(first + WINDOW, end))
            before, after = phase.counts(first), phase.counts(last)
            counts = np.subtract(after, before)
            order = permuted(np.arange(last - first), n=last - first, key=key(seed, "mixture", "window", first))
            sources = np.repeat(np.arange(len(counts)), counts)[order]
            numbers = np.empty_like(sources)
            for number, count in enumerate(counts):
                numbers[sources == number] = before[number] + np.arange(count)
            yield first, sources, numbers
            position = last

    def __repr__(self) -> str:
        sources = ", ".join(f"{name}={length}" for name, length in zip(self.names, self.lengths, strict=True))
        return f"mixture({sources}, weights={self.weights}, {self.order})"


@checked
def mixture(sources: Mapping[str, Any], *, weights: Curriculum | None = None, label: str | None = None) -> Mixture:
    """Mix datasets by weights.

    Which source sample ``i`` of the job comes from, and which of its samples it is, is a pure function of seed and
    ``i``, at a cost that does not grow with ``i``. In each window of 1024 samples a source has as many places as its
    weight gives it, so that after ``i`` samples it has had ``weight * i`` of them, up to a window and as many samples
    as there are sources: not by chance, as with independent draws. The places are shuffled by a keyed permutation. Each
    source goes through its own samples without replacement, epoch after epoch.

    One epoch of the stream is as many samples as all sources have together. An evaluation goes through the sources one
    after the other.

    Args:
        sources: Datasets that can be indexed, as :func:`~forgather_fn.data.batching.batches` takes them, by name.
        weights: A share for each name, of which only the ratios count; None for shares by length. For a curriculum,
            weights by the positions, in samples, from which on they hold (``{0: {...}, 100_000: {...}}``: exact, found
            in the logarithm of their number); or a function of the position, which is asked every 4096 samples: then a
            start far into a job asks it for all positions before, once.
        label: A key under which each sample, a mapping then, has the number of its source, for
            :func:`~forgather_fn.losses.by_source`; None for none.

    Raises:
        ValueError: There is no source, one is empty, or cannot be indexed; or the weights are not those of the sources.

    Example:
        >>> from forgather_fn import batches
        >>> both = mixture({"code": range(10), "prose": range(100, 105)}, weights={"code": 0.25, "prose": 0.75})
        >>> next(batches(both, batch_size=8, order="sequential").start(seed=0, samples=0)).data.tolist()
        [100, 101, 102, 103, 104, 100, 101, 102]
    """
    if not isinstance(sources, Mapping) or not all(isinstance(name, str) for name in sources):
        raise ValueError(f"mixture: sources must be a mapping of names to datasets; got {shown(sources)}")
    if not sources:
        raise ValueError("a mixture needs at least one source")
    nested = [name for name, dataset in sources.items() if isinstance(dataset, Mixture)]
    if nested:
        raise ValueError(f"{nested[0]!r} is a mixture itself: mix its sources, with the products of the weights")
    given = {name: samples_of(dataset) for name, dataset in sources.items()}
    lengths = {name: len(found.sized) for name, found in given.items()}
    for name, length in lengths.items():
        if not length:
            raise ValueError(f"source {name!r} is empty: there is nothing to draw from it")
    names = tuple(sources)
    shares = lengths if weights is None else weights
    return Mixture(names, tuple(lengths.values()), phases(shares, names), label, tuple(given.values()))
