"""Threads that read ahead: the same batches, errors where they are due, and nothing left behind."""

import contextlib
import itertools
import threading
import time
from typing import Any

import pytest
import torch

import forgather_fn as ff
from forgather_fn.share import Share
from forgather_fn.testing import check_data
from tests.specimens import values
from tests.streams import LASTS, Failing, Noise, Squares, same, taken


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("forgather-data")]


class Slow(Squares):
    """Takes longer for earlier samples, so that later ones are ready first."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(0.002 * (3 - index % 4))
        return super().__getitem__(index)


@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_the_same_whichever_thread_is_faster(last: Any, threads: int) -> None:
    given = {"batch_size": 4, "last": last, "epochs": 2}
    expected = list(ff.batches(Slow(10), **given).start(1, 4))
    assert same(list(ff.batches(Slow(10), threads=threads, **given).start(1, 4)), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_laws_hold(threads: int) -> None:
    check_data(ff.batches(Squares(9), batch_size=4, threads=threads))
    check_data(ff.batches({"x": torch.arange(9.0)}, batch_size=4, threads=threads, prefetch=1))


def test_each_process_reads_its_own() -> None:
    stream = ff.batches(torch.arange(11), batch_size=6, threads=2, epochs=2)
    plain = ff.batches(torch.arange(11), batch_size=6, epochs=2)
    for rank in (0, 1):
        found, expected = (list(one.start(0, 0, Share(2, rank, 2))) for one in (stream, plain))
        for one, other in zip(found, expected, strict=True):
            assert [part.tolist() for part in one.data.items] == [part.tolist() for part in other.data.items]


def test_reading_goes_on_while_a_step_runs() -> None:
    read: list[int] = []

    class Watched(Squares):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return index

    with contextlib.closing(ff.batches(Watched(100), batch_size=2, threads=1, prefetch=3).start(0, 0)) as batches:
        next(batches)
        deadline = time.monotonic() + 10
        while len(read) < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(read) == 8  # the batch given, and three more: no further
        time.sleep(0.02)
        assert len(read) == 8


def test_closing_ends_the_threads() -> None:
    taken(ff.batches(Slow(100), batch_size=2, threads=2).start(0, 0), 2)
    assert not alive()
    plan = ff.Plan(model=torch.nn.Linear(5, 3), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1)
    program = ff.single(plan)
    list(ff.until(steps=2)(program.steps(program.init(0), ff.batches(values(20), batch_size=4, threads=2))))
    assert not alive()


def raising() -> None:
    raise OSError("the disk is gone")


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_where_its_batch_is_due(threads: int) -> None:
    stream = ff.batches(Failing(12, 5, raising), batch_size=2, order="sequential", threads=threads)
    batches = stream.start(0, 0)
    assert [next(batches).data.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(batches)
    assert "while fetching samples 4 to 5 of the job: [4 5]" in "".join(caught.value.__notes__)
    assert not alive()


def test_draws_are_seen_and_refused() -> None:
    with pytest.raises(ValueError, match="drew from a global random generator"):
        next(ff.batches(Noise(9), batch_size=2, threads=2).start(0, 0))
    with pytest.raises(ValueError, match=r"threads with random=True.*workers=1"):
        ff.batches(Noise(9), batch_size=2, threads=1, random=True)
    with pytest.raises(ValueError, match="workers=1 and threads=1"):
        ff.batches(Squares(9), batch_size=2, threads=1, workers=1)


def test_a_step_draws_what_it_draws_without_threads() -> None:
    def trained(threads: int) -> ff.TrainState:
        plan = ff.Plan(
            model=lambda: torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3)),
            loss=ff.losses.mse,
            optimizer=ff.adamw(),
            schedule=0.1,
        )
        program = ff.single(plan)
        data = list(zip(*values(20), strict=True))
        steps = program.steps(program.init(0), ff.batches(data, batch_size=4, threads=threads, collate=stacked))
        return ff.last(ff.until(steps=8)(steps))

    assert ff.difference(trained(0), trained(2)) is None


def stacked(rows: list[Any]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def test_hiding_a_sleep() -> None:
    """Two threads and a step that takes as long: at most two thirds of the time that it takes in turn."""

    class Sleeping(Squares):
        def __getitem__(self, index: int) -> int:
            time.sleep(0.01)
            return index

    def seconds(threads: int) -> float:
        begun = time.monotonic()
        with contextlib.closing(ff.batches(Sleeping(100), batch_size=2, threads=threads).start(0, 0)) as batches:
            for _ in itertools.islice(batches, 10):
                time.sleep(0.02)
        return time.monotonic() - begun

    assert seconds(2) < 0.8 * seconds(0)
