"""Several threads of one process: each gets what it would get alone."""

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import forgather_fn as ff
from forgather_fn.random import seeded
from forgather_fn.turn import turn

x, y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def drawing() -> nn.Module:
    """Build a model that draws, and keeps statistics."""
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))


def program() -> ff.Program:
    return ff.single(
        ff.Plan(model=drawing, loss=ff.losses.cross_entropy, optimizer=ff.adamw(), schedule=1e-2, microbatches=2)
    )


def trained(one: ff.Program, seed: int, data: ff.Stream) -> ff.TrainState:
    return ff.last(ff.until(steps=40)(one.steps(one.init(seed), data)))


@pytest.fixture
def switching() -> Iterator[None]:
    """Let threads take turns after every few operations of Python."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*work: Callable[[], Any]) -> list[Any]:
    """Call functions in threads that begin together."""
    results: list[Any] = [None] * len(work)
    begin = threading.Barrier(len(work))

    def call(number: int) -> None:
        begin.wait()
        results[number] = work[number]()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.usefixtures("switching")
class TestThreads:
    @pytest.mark.parametrize("shared", [True, False], ids=["one program", "a program each"])
    def test_that_train_get_what_each_gets_alone(self, shared: bool) -> None:
        data = ff.batches((x, y), batch_size=8)
        wanted = [trained(program(), seed, data) for seed in (0, 1)]
        one = program()
        made = (one, one) if shared else (one, program())
        found = at_once(lambda: trained(made[0], 0, data), lambda: trained(made[1], 1, data))
        assert [ff.difference(*pair) for pair in zip(found, wanted, strict=True)] == [None, None]

    def test_that_evaluate_see_their_own_state(self) -> None:
        one = program()
        state, other = one.init(0), one.init(1)
        wanted = one.evaluate(other, [(x, y)])
        following = trained(program(), 0, ff.batches((x, y), batch_size=8))
        found, results = at_once(
            lambda: ff.last(ff.until(steps=40)(one.steps(state, ff.batches((x, y), batch_size=8)))),
            lambda: [one.evaluate(other, [(x, y)]) for _ in range(40)],
        )
        assert all(result == wanted for result in results)
        assert ff.difference(found, following) is None

    def test_that_read_are_not_taken_for_ones_that_draw(self) -> None:
        def first_of_many() -> int:
            return sum(next(ff.batches((x, y), batch_size=8).start(seed=0, samples=0)).samples for _ in range(100))

        one = program()
        read, _ = at_once(first_of_many, lambda: trained(one, 0, ff.batches((x, y), batch_size=8)))
        assert read == 800


def test_who_draws_under_a_seed_is_waited_for() -> None:
    within, seeded_again, read = (threading.Event() for _ in range(3))

    def drawn(seed: int) -> float:
        return float(torch.rand((), generator=torch.Generator().manual_seed(seed)))

    def first() -> float:
        with seeded(0, torch.device("cpu")):
            within.set()
            seeded_again.wait(0.1)  # in vain
            found = float(torch.rand(()))
        read.set()
        return found

    def second() -> float:
        within.wait()
        with seeded(1, torch.device("cpu")):
            seeded_again.set()
            read.wait(0.1)
            return float(torch.rand(()))

    assert at_once(first, second) == [drawn(0), drawn(1)]


def seeds() -> None:
    with seeded(0, torch.device("cpu")):
        pass


def test_a_process_that_was_forked_in_the_middle_of_a_turn_goes_on() -> None:
    forked: list[int | None] = []

    def fork() -> None:
        child = multiprocessing.get_context("fork").Process(target=seeds)
        child.start()
        child.join(20)
        forked.append(child.exitcode)
        child.kill()

    with turn():
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert forked == [0]
