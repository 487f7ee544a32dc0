"""Streams over sources that can only be read one sample after the other; their state is a cursor."""

import contextlib
import itertools
import json
from collections.abc import Generator
from typing import Any, Final

import attrs
import numpy as np
import torch

from forgather_fn.data.batch import Batch, digest
from forgather_fn.data.fetch import Collate
from forgather_fn.data.loading import MSG_DRAWN, Generators, Request, pinned, reseed
from forgather_fn.data.resumable import Json, Reader, Resumable
from forgather_fn.data.sizes import Sizes
from forgather_fn.data.stream import VERSION, Last, Stream
from forgather_fn.data.threads import in_threads
from forgather_fn.describe import describe
from forgather_fn.random import key
from forgather_fn.share import Microbatches, Share
from forgather_fn.turn import turn

FORMAT: Final = 1
"""Of cursors. One of another format is refused."""


@attrs.frozen(eq=False, repr=False)
class IteratedStream(Stream):
    """Batches of a source that is read one sample after the other.

    Where it goes on is a cursor that each batch has, and that a state keeps: the number of samples alone does not say
    it. The cursor knows neither batch size nor processes: every process reads the whole source and keeps the samples of
    its microbatches, so that their number may change; ``accelerated(plan, dispatch="rank0")`` has one of them read.
    What is lost against :class:`~forgather_fn.data.indexed.IndexedStream`: the order is the source's own, there are no
    worker processes, a start anywhere but at a cursor is refused, and a source without a state of its own is read again
    up to the cursor.

    Attributes:
        source: What is read.
        batch_size, last, collate, epochs, threads, prefetch, pin_memory, random, seed: As given to
            :func:`~forgather_fn.data.batching.batches`.
    """

    source: Resumable
    batch_size: int | Sizes
    last: Last
    collate: Collate
    epochs: int | None
    threads: int
    prefetch: int
    pin_memory: bool
    random: bool
    seed: int | None

    @property
    def epoch_length(self) -> int | None:
        """None: it is not known before the epoch is over."""
        return None

    @property
    def total_samples(self) -> int | None:
        """None: it is not known before the end."""
        return None

    @property
    def least(self) -> int | None:
        """Samples in the smallest batch, but for one that ends an epoch or the stream; None if it is not known."""
        return self.batch_size if isinstance(self.batch_size, int) else self.batch_size.least

    @property
    def varies(self) -> bool:
        """Whether batches are of several sizes; that the last is smaller is not known before, if there is a last."""
        return self.last == "ragged" or self.epochs is not None or isinstance(self.batch_size, Sizes)

    def start(
        self, seed: int, samples: int, share: Share | None = None, *, cursor: str | None = None
    ) -> Generator[Batch, None, None]:
        """Give the batches from a cursor on; see :meth:`~forgather_fn.data.stream.Stream.start`.

        Raises:
            ValueError: Samples were consumed, but there is no cursor, or it is that of another number of samples, of
                another source, or of another version.
        """
        seed = int(seed if self.seed is None else self.seed)
        reading = Reading(self, seed, _place(cursor, samples, self.source.name))
        if isinstance(self.batch_size, Sizes):
            self.batch_size.at(samples)
        return self._batches(reading, share)

    def one_pass(self, rank: int = 0, size: int = 1) -> Generator[Batch, None, None]:
        """Give every sample of the first epoch once; every process reads all, and each takes one batch in turn."""
        once = attrs.evolve(self, last="ragged", epochs=1, threads=0)
        whole = once._batches(Reading(once, self.seed or 0, Place()), None)
        with contextlib.closing(whole):
            yield from itertools.islice(whole, rank, None, size)

    def count(self, start: int, stop: float) -> int | None:
        """None: where the stream ends is not known."""
        return None

    def fingerprint(self, seed: int, share: Share | None = None) -> str:
        """Name the kind of the source, with its version, and what decides what it draws."""
        parts = [f"data/{VERSION}", f"source={self.source.name}", f"last={self.last}"]
        if self.last == "drop":
            parts.append(f"batch_size={self.batch_size}")
        return " ".join([*parts, f"random={self.random}", f"seed={int(seed if self.seed is None else self.seed)}"])

    def __repr__(self) -> str:
        names = [field.name for field in attrs.fields(IteratedStream)[1:]]
        given = ", ".join(f"{name}={describe(getattr(self, name))}" for name in names)
        return f"batches(<{self.source.name}>, {given})"

    def _batches(self, reading: "Reading", share: Share | None) -> Generator[Batch, None, None]:
        nothing = np.empty(0, np.int64)
        requests = (Request(0, nothing, nothing, 0, first=number == 0) for number in itertools.count())
        fetch = attrs.evolve(reading, share=share)
        answers = (
            in_threads(fetch, requests, threads=1, prefetch=self.prefetch, pin_memory=False)
            if self.threads
            else ((request, fetch[request]) for request in requests)
        )
        with contextlib.closing(answers):
            for _, batch in answers:
                if batch is None:
                    return
                yield batch


@attrs.frozen
class Place:
    """Where a stream is: in which epoch, how many samples of it and of all were consumed, and the source's state."""

    epoch: int = 0
    offset: int = 0
    samples: int = 0
    state: Json = None


@attrs.define(eq=False)
class Reading:
    """A stream that is being read: one batch a request, in order.

    Attributes:
        stream: What is read.
        seed: Under which samples draw.
        place: Up to where it has been read.
        share: Which microbatches are kept; None for whole batches.
        reader: Of the epoch that is being read.
        witness: That of its first batch; see :class:`~forgather_fn.data.batch.Batch`.
    """

    stream: IteratedStream
    seed: int
    place: Place
    share: Share | None = None
    reader: Reader | None = None
    witness: str | None = None

    def __getitem__(self, request: Request, /) -> Batch | None:
        """Read the next batch; None after the last."""
        if not (self.stream.random or request.first):
            return self._read(request, None)
        with turn():
            return self._read(request, Generators.read())

    def _read(self, request: Request, before: Generators | None) -> Batch | None:
        try:
            batch = self._next()
            if batch is not None and request.first:
                batch = attrs.evolve(batch, witness=self.witness)
        except Exception as error:
            error.add_note(f"while reading a batch from sample {self.place.samples} of the job on")
            raise
        finally:
            if before is not None and self.stream.random:
                before.restore()
        if before is not None and not self.stream.random and (names := before.advanced()):
            before.restore()
            raise ValueError(MSG_DRAWN.format(names=", ".join(names)))
        return batch

    def _next(self) -> Batch | None:
        stream, place = self.stream, self.place
        size = stream.batch_size if isinstance(stream.batch_size, int) else stream.batch_size.at(place.samples)
        first = place.epoch, place.offset
        samples: list[Any] = []
        while len(samples) < size:
            if stream.epochs is not None and self.place.epoch >= stream.epochs:
                break
            offset = self.place.offset
            found = self._sample()
            if found is not _OVER:
                samples.append(found)
            elif stream.last == "ragged" and samples:
                break
            elif stream.last == "drop":
                if len(samples) == offset:
                    raise ValueError(
                        f"last='drop' leaves nothing of an epoch of {offset} samples in batches of {size}: use "
                        "a smaller batch_size, or last='span'"
                    )
                samples.clear()
        if not samples or (stream.last == "drop" and len(samples) < size):
            return None
        return self._batch(samples, ragged=len(samples) < size, first=first)

    def _sample(self) -> Any:
        """Read one sample, or go on to the next epoch."""
        if self.reader is None:
            self.reader = self._opened()
        place = self.place
        try:
            if self.stream.random:
                self._reseed("sample", place.epoch, place.offset)
            found = next(self.reader)
        except StopIteration:
            if not place.offset:
                raise ValueError(
                    f"epoch {place.epoch} of the source gave no samples: nothing can be read of it"
                ) from None
            self.reader, self.place = None, Place(place.epoch + 1, 0, place.samples)
            return _OVER
        self.place = Place(place.epoch, place.offset + 1, place.samples)
        return found

    def _opened(self) -> Reader:
        place = self.place
        return self.stream.source.open(seed=self.seed, epoch=place.epoch, samples=place.offset, state=place.state)

    def _batch(self, samples: list[Any], *, ragged: bool, first: tuple[int, int]) -> Batch:
        place, share = self.place, self.share
        before, place = place, Place(place.epoch, place.offset, place.samples + len(samples))
        state = None if self.reader is None else self.reader.state()
        if share is not None:
            share.check(len(samples), ragged=ragged)
        rows = [slice(len(samples))] if share is None else share.rows(len(samples))
        data = [self._collated(samples[part], first, part.start or 0) for part in rows]
        if share is not None and share.size > 1 and self.witness is None:
            common = attrs.evolve(share, rank=0).rows(len(samples))[0]
            self.witness = digest(self._collated(samples[common], first, common.start) if share.rank else data[0])
        self.place = place
        return Batch(
            data[0] if share is None else Microbatches(tuple(data), share.block.start),
            len(samples),
            None,
            ragged=ragged,
            varies=self.stream.varies,
            cursor=_cursor(attrs.evolve(place, state=state), self.stream.source.name),
            position=before.samples,
        )

    def _collated(self, samples: list[Any], first: tuple[int, int], row: int) -> Any:
        if self.stream.random:
            self._reseed("collate", *first, row)
        data = self.stream.collate(samples)
        return pinned(data) if self.stream.pin_memory and torch.accelerator.is_available() else data

    def _reseed(self, stream: str, *which: int) -> None:
        reseed(key(self.seed, stream, *which))


_OVER: Final = object()
"""Stands for the end of an epoch."""


def _cursor(place: Place, source: str) -> str:
    return json.dumps({"format": FORMAT, "source": source, **attrs.asdict(place, recurse=False)}, sort_keys=True)


def _place(cursor: str | None, samples: int, source: str) -> Place:
    """Read a cursor, or begin at the start.

    Raises:
        ValueError: It is not one that this source can go on from.
    """
    if samples < 0:
        raise ValueError(f"samples={samples}: a stream starts at position 0 or later")
    if cursor is None:
        if samples:
            raise ValueError(
                f"samples={samples}, but there is no cursor: a source that is read one sample after the other goes on "
                "where a batch of it ended, not at a number. Go on from a state that was trained on it; or start it "
                "anew: attrs.evolve(state, data=None, samples=0)."
            )
        return Place()
    try:
        held = json.loads(cursor)
        written = held.pop("format"), held.pop("source")
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ValueError(f"this is no cursor: {cursor!r}; expected that of a batch, or of a state") from None
    if written != (FORMAT, source):
        raise ValueError(
            f"this cursor was written by another source, or another version of it:\n  the cursor: {cursor}\n"
            f"  the source: {source}, cursors of format {FORMAT}"
        )
    if held["samples"] != samples:
        raise ValueError(f"the cursor is that of {held['samples']} samples, but the job has consumed {samples}")
    return Place(**held)
