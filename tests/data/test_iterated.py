"""Sources that are read one sample after the other: cursors, epochs, and what is refused."""

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import toolz
import torch
from torch.utils.data import DataLoader, IterableDataset

import forgather_fn as ff
from forgather_fn.data.resumable import Reader
from forgather_fn.share import Share
from tests.streams import LASTS

LENGTH = 7


class Lines(IterableDataset[int]):
    """An iterable of torch, without a state; each epoch starts elsewhere."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from range(100 * self.epoch, 100 * self.epoch + LENGTH)


class Stateful(Lines):
    """Says and takes where it is, and counts what it reads."""

    read = 0
    next = 0

    def __iter__(self) -> Iterator[int]:
        while self.next < LENGTH:
            self.next += 1
            Stateful.read += 1
            yield 100 * self.epoch + self.next - 1
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Own:
    """A source with a cursor of its own making, shuffled under the data seed."""

    name = "own/3"

    def open(self, *, seed: int, epoch: int, samples: int, state: Any) -> Reader:
        values = random.Random(f"{seed} {epoch}").sample(range(LENGTH), LENGTH)

        @attrs.define
        class Held:
            at: int

            def __next__(self) -> int:
                if self.at == LENGTH:
                    raise StopIteration
                self.at += 1
                return values[self.at - 1]

            def state(self) -> Any:
                return {"at": self.at}

        return Held(0 if state is None else state["at"])


def huggingface() -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"x": list(range(LENGTH))}).to_iterable_dataset(num_shards=2)


SOURCES = {
    "torch": Lines,
    "stateful": Stateful,
    "function": lambda: lambda: iter(range(LENGTH)),
    "generator": lambda: lambda: (value for value in range(LENGTH)),
    "own": Own,
    "huggingface": huggingface,
}


def stream_of(kind: str, **given: Any) -> Any:
    return ff.batches(SOURCES[kind](), **{"batch_size": 3, "order": "sequential", **given})


def contents(batches: Any) -> list[Any]:
    values = lambda data: data["x"] if isinstance(data, dict) else data  # noqa: E731
    return [(values(b.data).tolist(), b.samples, b.ragged, b.cursor) for b in batches]


def same(ones: list[Any], others: list[Any], kind: str = "") -> bool:
    """Whether contents agree, with their cursors; Hugging Face's states name one place in several ways."""
    if kind == "huggingface":
        ones, others = ([content[:3] for content in contents] for contents in (ones, others))
    return ones == others


@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_cursor_goes_on_where_its_batch_ended(kind: str, last: Any, threads: int) -> None:
    stream = stream_of(kind, last=last, threads=threads)
    whole = contents(itertools.islice(stream.start(5, 0), 9))
    samples = 0
    for number, (_, count, _, cursor) in enumerate(whole[:-1]):
        samples += count
        again = stream_of(kind, last=last, threads=threads)
        found = contents(itertools.islice(again.start(5, samples, cursor=cursor), 8 - number))
        assert same(found, whole[number + 1 :], kind)
        assert json.loads(cursor)["samples"] == samples


@pytest.mark.parametrize("kind", SOURCES)
def test_every_epoch_gives_all_samples(kind: str) -> None:
    batches = contents(stream_of(kind, epochs=2).start(0, 0))
    found = [value for values, *_ in batches for value in values]
    assert [len(values) for values, *_ in batches] == [3, 3, 3, 3, 2]
    for epoch in (found[:LENGTH], found[LENGTH:]):
        assert sorted(value % 100 for value in epoch) == list(range(LENGTH))
    ragged = contents(stream_of(kind, epochs=2, last="ragged").start(0, 0))
    assert [(count, short) for _, count, short, _ in ragged] == [(3, False), (3, False), (1, True)] * 2
    dropped = contents(stream_of(kind, epochs=2, last="drop").start(0, 0))
    assert [count for _, count, *_ in dropped] == [3] * 4


def test_epochs_are_told() -> None:
    batches = contents(stream_of("torch", epochs=2).start(0, 0))
    assert [value for values, *_ in batches for value in values] == [*range(7), *range(100, 107)]


def test_a_batch_of_another_size_goes_on_at_the_same_cursor() -> None:
    *_, (_, _, _, cursor) = contents(itertools.islice(stream_of("stateful").start(0, 0), 3))
    (after, *_), *_ = contents(stream_of("stateful", batch_size=4, epochs=2).start(0, 9, cursor=cursor))
    assert after == [102, 103, 104, 105]


def test_a_state_spares_reading_again() -> None:
    *_, (_, _, _, cursor) = contents(itertools.islice(stream_of("stateful").start(0, 0), 2))
    Stateful.read = 0
    next(stream_of("stateful").start(0, 6, cursor=cursor))
    assert Stateful.read == 3


def test_of_two_readers_of_one_object_the_later_goes_on() -> None:
    stream = stream_of("stateful")
    first, second = stream.start(0, 0), stream.start(0, 0)
    next(first)
    assert next(second).data.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="this Stateful was started again meanwhile"):
        next(first)


@pytest.mark.parametrize("kind", SOURCES)
def test_processes_keep_their_microbatches(kind: str) -> None:
    whole = list(itertools.islice(stream_of(kind, batch_size=5).start(0, 0), 4))
    ranks = [list(itertools.islice(stream_of(kind, batch_size=5).start(0, 0, Share(4, rank, 2)), 4)) for rank in (0, 1)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert {part.cursor for part in parts} == {batch.cursor}
        values = batch.data["x"] if kind == "huggingface" else batch.data
        pieces = [piece["x"] if kind == "huggingface" else piece for part in parts for piece in part.data.items]
        assert torch.equal(torch.cat(pieces), values)


def test_an_evaluation_gives_every_sample_once() -> None:
    stream = stream_of("stateful")
    ones, twos = (contents(stream.one_pass(rank, 2)) for rank in (0, 1))
    assert [values for values, *_ in (*ones, *twos)] == [[0, 1, 2], [6], [3, 4, 5]]


class Drawing(Lines):
    def __iter__(self) -> Iterator[Any]:
        for number in range(LENGTH):
            yield number + random.random() + torch.rand(()).item()


def test_draws_are_keyed_by_their_sample() -> None:
    def started(samples: int, cursor: str | None, batch_size: int = 2) -> Any:
        stream = ff.batches(Drawing(), batch_size=batch_size, order="sequential", random=True)
        return stream.start(1, samples, cursor=cursor)

    before = torch.get_rng_state()
    whole = list(itertools.islice(started(0, None), 5))
    later = list(itertools.islice(started(4, whole[1].cursor), 3))
    assert all(torch.equal(one.data, other.data) for one, other in zip(whole[2:], later, strict=True))
    (five,) = itertools.islice(started(0, None, 10), 1)
    assert torch.equal(five.data, torch.cat([batch.data for batch in whole]))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"drew from a global random generator \(python's random, torch's"):
        next(ff.batches(Drawing(), batch_size=2, order="sequential").start(1, 0))


def state_of(stream: Any, steps: int = 2) -> tuple[Any, ff.TrainState]:
    plan = ff.Plan(model=torch.nn.Linear(1, 1), loss=ff.losses.mse, optimizer=ff.adamw(), schedule=0.1)
    program = ff.single(plan)
    return program, toolz.pipe(program.steps(program.init(0), stream), ff.until(steps=steps), ff.last)


def pairs(samples: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(samples, dtype=torch.float32)[:, None]
    return x, 2 * x


def test_a_state_keeps_the_cursor_and_refuses_others() -> None:
    stream = ff.batches(Stateful(), batch_size=3, order="sequential", collate=pairs)
    program, state = state_of(stream)
    assert json.loads(state.cursor or "")["state"] == {"next": 6}
    gradients, buffers, _ = program.gradients(state, next(stream.start(0, 6, cursor=state.cursor)))
    following, _ = program.update(state, gradients, buffers)
    assert json.loads(following.cursor or "")["samples"] == following.samples == 9
    with pytest.raises(ValueError, match=r"another stream of data[^$]*source=stateful/1[^$]*source=own/3"):
        program.steps(following, ff.batches(Own(), batch_size=3, order="sequential", collate=pairs))
    lost = attrs.evolve(following, cursor=None)
    with pytest.raises(ValueError, match="samples=9, but there is no cursor"):
        next(iter(program.steps(lost, stream)))
    with pytest.raises(ValueError, match="the cursor is that of 9 samples, but the job has consumed 6"):
        stream.start(0, 6, cursor=following.cursor)
    with pytest.raises(ValueError, match="written by another source"):
        ff.batches(Own(), batch_size=3, order="sequential").start(0, 9, cursor=following.cursor)
    for wrong in ("", "[]", "{}", 3):
        with pytest.raises(ValueError, match="this is no cursor"):
            stream.start(0, 9, cursor=wrong)
    with pytest.raises(ValueError, match="a cursor belongs to a source"):
        ff.batches(range(9), batch_size=3).start(0, 9, cursor=following.cursor)


class Shrinking(Lines):
    length = LENGTH

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


def test_a_source_that_gives_less_than_before_is_refused() -> None:
    source = Shrinking()
    stream = ff.batches(source, batch_size=3, order="sequential")
    *_, batch = itertools.islice(stream.start(0, 0), 2)
    source.length = 5
    with pytest.raises(ValueError, match="gave only 5 samples, but 6 of it were consumed before"):
        next(stream.start(0, 6, cursor=batch.cursor))


class Tensors(Stateful):
    def state_dict(self) -> dict[str, Any]:
        return {"next": torch.zeros(())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        (lambda: Lines(), {"order": "shuffled"}, "in its own order: say order='sequential'"),
        (lambda: Lines(), {"workers": 2}, "threads=1"),
        (lambda: Lines(), {"threads": 2}, "threads=1"),
        (lambda: iter(range(3)), {}, "can be read only once"),
        (lambda: (x for x in range(3)), {}, "a generator can be read only once"),
        (lambda: ff.data.counted(iter(range(3))), {}, "can be read only once"),
        (lambda: DataLoader([1, 2]), {}, "gives batches, where samples are expected"),
        (lambda: Lines(), {"random": True, "threads": 1}, "threads with random=True"),
    ],
)
def test_what_cannot_be_honoured_is_refused(source: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ff.batches(source(), **{"batch_size": 2, "order": "sequential", **given})


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        (lambda: iter(()), {}, "epoch 0 of the source gave no samples"),
        (lambda: iter(range(2)), {"last": "drop", "batch_size": 3}, "leaves nothing of an epoch of 2 samples"),
        (Tensors(), {}, "cannot be written as JSON .*ff.data.counted"),
    ],
)
def test_what_cannot_be_read_is_refused(source: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(ff.batches(source, **{"batch_size": 2, "order": "sequential", **given}).start(0, 0))


def test_a_buffer_that_is_lost_is_refused() -> None:
    shuffled = huggingface().shuffle(seed=0, buffer_size=3)
    with pytest.raises(ValueError, match="its state leaves out what is in the buffer"):
        ff.batches(shuffled, batch_size=2, order="sequential")
    stream = ff.batches(ff.data.counted(shuffled), batch_size=2, order="sequential")
    whole = contents(itertools.islice(stream.start(0, 0), 6))
    assert contents(itertools.islice(stream.start(0, 4, cursor=whole[1][3]), 4)) == whole[2:]


def test_until_epochs_needs_a_length() -> None:
    program, state = state_of(ff.batches(Stateful(), batch_size=3, order="sequential", collate=pairs))
    with pytest.raises(ValueError, match=r"ff\.batches\(source, epochs="):
        ff.until(epochs=1)(program.steps(state, stream_of("stateful")))


def test_an_error_comes_where_its_batch_is_due() -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise OSError("the disk is gone")

    for threads in (0, 1):
        stream = ff.batches(lambda: failing(), batch_size=2, order="sequential", threads=threads)
        batches = stream.start(0, 0)
        assert [next(batches).data.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
