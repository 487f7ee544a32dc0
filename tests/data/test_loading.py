"""Workers change nothing, and neither do random draws outside the stream; nor does the stream change those."""

import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

import forgather_fn.data.loading
from forgather_fn.data import IndexedStream, batches
from forgather_fn.data.loading import Generators
from forgather_fn.random import key
from tests.streams import ORDERS, Failing, Noise, Squares, columns, noisy, same, taken

# Workers.


@pytest.mark.parametrize("last", ["span", "ragged"])
def test_workers_change_nothing(last: Any) -> None:
    one, other = (
        batches(Squares(10), batch_size=4, last=last, epochs=4, workers=workers, prefetch=3) for workers in (0, 2)
    )
    assert same(list(other.start(0, 0)), list(one.start(0, 0)))
    assert same(list(other.start(0, 10)), list(one.start(0, 10)))


def test_closing_ends_the_workers() -> None:
    iterator = batches(Squares(10), batch_size=4, workers=2).start(0, 0)
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    assert multiprocessing.active_children() == []


def unreadable() -> None:
    raise KeyError("no such file")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_sample_is_named(workers: int) -> None:
    stream = batches(Failing(12, 6, unreadable), batch_size=2, order="sequential", workers=workers)
    iterator = stream.start(0, 12)
    assert [next(iterator).samples for _ in range(3)] == [2, 2, 2]
    with pytest.raises(KeyError, match="no such file") as caught:
        next(iterator)
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "while fetching samples 18 to 19 of the job: [6 7]" in told
    assert multiprocessing.active_children() == []
    assert list(iterator) == []


def test_a_killed_worker_is_an_error() -> None:
    dataset = Failing(8, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        next(batches(dataset, batch_size=2, order="sequential", workers=1).start(0, 0))
    assert multiprocessing.active_children() == []


def test_a_hanging_worker_is_an_error_and_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgather_fn.data.loading, "WORKER_TIMEOUT", 0.1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # how long torch waits for its end
    with pytest.raises(RuntimeError, match=r"timed out after 0\.1 seconds"):
        next(batches(Failing(8, 0, signal.pause), batch_size=2, order="sequential", workers=1).start(0, 0))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_what_collate_makes_is_not_converted(workers: int) -> None:
    (batch,) = taken(batches(range(4), batch_size=2, collate=np.array, workers=workers).start(0, 0), 1)
    assert isinstance(batch.data, np.ndarray)


class Signals(Squares):
    def __getitem__(self, index: int) -> Any:
        return [int(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]  # type: ignore[arg-type]


def test_signals_are_left_to_the_parent() -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        (batch,) = taken(batches(Signals(1), batch_size=1, workers=1).start(0, 0), 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [int(value) for value in batch.data] == [signal.SIG_IGN, signal.SIG_IGN]


@pytest.mark.parametrize("workers", [0, 1])
def test_pinning_changes_nothing_without_an_accelerator(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    plain, pinned = (
        batches(columns(), batch_size=5, workers=workers, epochs=1, pin_memory=pin) for pin in (False, True)
    )
    assert same(list(plain.start(0, 0)), list(pinned.start(0, 0)))


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_pinning(workers: int) -> None:
    stream = batches(columns(), batch_size=5, workers=workers, epochs=1, pin_memory=True)
    assert all(leaf.is_pinned() for batch in stream.start(0, 0) for leaf in batch.data.values())


# Random draws.


def generators() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, tuple(keys), *rest, torch.default_generator.get_state().tolist()


@pytest.fixture
def untouched() -> Iterator[None]:
    before = generators()
    yield
    assert generators() == before


NOISY: dict[str, Callable[..., IndexedStream]] = {
    "dataset": lambda **more: batches(Noise(10), random=True, **more),
    "collate": lambda **more: batches(range(10), collate=noisy, random=True, **more),
    "collate of columns": lambda **more: batches(torch.arange(10), collate=noisy, random=True, **more),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", NOISY)
def test_draws_repeat(name: str) -> None:
    outside = Generators.read()
    whole = list(NOISY[name](batch_size=4, epochs=4).start(0, 0))
    for k in (0, 1, 5):  # whatever was drawn elsewhere since
        _ = random.random(), np.random.rand(), torch.rand(())
        assert same(list(NOISY[name](batch_size=4, epochs=4).start(0, 4 * k)), whole[k:])
    outside.restore()
    assert same(list(NOISY[name](batch_size=4, epochs=4, workers=2).start(0, 8)), whole[2:])


def drawn(stream: IndexedStream, count: int, seed: int = 0) -> dict[tuple[int, int], tuple[float, ...]]:
    """What each sample drew, by its epoch and index."""
    draws = {}
    position = 0
    for batch in taken(stream.start(seed, 0), count):
        for row in range(batch.samples):
            place = (position // stream.length, int(batch.data["index"][row]))
            draws[place] = tuple(batch.data["drawn"][row].tolist())
            position += 1
    return draws


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("subset", [False, True])
def test_draws_of_a_sample_do_not_depend_on_the_batch(subset: bool) -> None:
    dataset = Subset(Noise(10), range(10)) if subset else Noise(10)
    one, other = (batches(dataset, batch_size=size, random=True) for size in (3, 4))
    draws = drawn(one, 20)
    assert len(draws) == 60
    assert drawn(other, 15) == draws
    # ... nor on the order in which samples come ...
    assert drawn(batches(dataset, batch_size=4, random=True, order="torch"), 15) == draws
    # ... but on epoch, sample and seed.
    assert len(set(draws.values())) == 60
    assert not set(drawn(one, 20, seed=1).values()) & set(draws.values())


@pytest.mark.usefixtures("untouched")
def test_draws_of_collate_are_those_of_its_first_sample() -> None:
    for batch in taken(NOISY["collate"](batch_size=4).start(7, 0), 3):
        first = torch.Generator().manual_seed(key(7, "collate", 0, int(batch.data["index"][0])))
        assert torch.equal(batch.data["noise"], torch.rand(4, dtype=torch.float64, generator=first))


class JointNoise(Squares):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [torch.rand(()).item() for _ in indices]


@pytest.mark.usefixtures("untouched")
def test_draws_of_a_joint_fetch_are_those_of_its_first_sample() -> None:
    stream = batches(JointNoise(10), batch_size=4, random=True, order="sequential")
    whole = [batch.data.tolist() for batch in taken(stream.start(0, 0), 10)]
    assert [batch.data.tolist() for batch in taken(stream.start(0, 12), 7)] == whole[3:]
    assert len({value for row in whole for value in row}) == 40
    assert "batch_size=4" in stream.fingerprint(0)


DRAWS: dict[str, Callable[[], Any]] = {
    "python's random": random.random,
    "numpy.random": np.random.rand,
    "torch's CPU generator": lambda: torch.rand(()),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", DRAWS)
def test_undeclared_draws_are_refused(name: str, workers: int) -> None:
    dataset = Failing(4, 2, DRAWS[name])
    iterator = batches(dataset, batch_size=2, order="sequential", workers=workers).start(0, 2)
    with pytest.raises(ValueError, match=rf"\({name}\).*random=False.*say batches\(\.\.\., random=True\)"):
        next(iterator)


@pytest.mark.usefixtures("untouched")
def test_undeclared_draws_of_collate_are_refused() -> None:
    with pytest.raises(ValueError, match="torch's CPU generator"):
        next(batches(range(4), batch_size=2, collate=noisy).start(0, 0))


@pytest.mark.usefixtures("untouched")
def test_generators_are_put_back_when_a_fetch_fails() -> None:
    def fail() -> None:
        raise KeyError(torch.rand(()))

    with pytest.raises(KeyError):
        next(batches(Failing(2, 0, fail), batch_size=2, random=True).start(0, 0))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_global_generators_are_untouched(order: Any, workers: int) -> None:
    list(batches(Squares(10), batch_size=4, order=order, epochs=2, workers=workers).start(0, 0))
