"""Processes of a pipeline that do not do the same: each is told, and none waits for ever."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed

import forgather_fn as ff
from forgather_fn.testing.processes import Processes, ProcessesFailed, processes
from tests.pipeline import runs
from tests.pipeline.models import MODELS, Plain, words

ONE = MODELS["plain"]
CUT = ONE.spec(2)


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2, timeout=20) as pool:
        yield pool


def begun_unlike(how: str) -> str:
    rank = distributed.get_rank()
    changes: dict[str, Any] = {"schedule": 1e-2 * (1 + rank)} if how == "rate" else {}
    if how == "model":
        changes["model"] = Plain(width=16 * (1 + rank))
    program = ff.pipelined(runs.plan_of(ONE, **changes), CUT)
    return told(lambda: program.init(seed=rank if how == "seed" else 3))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("rate", "other plans; schedule:"),
        ("model", "other plans; parameters:"),
        ("seed", "same seed, by which all of them draw, and were given:\n  rank 0: seed 0\n  rank 1: seed 1"),
    ],
)
def test_processes_that_begin_unlike_are_refused(two: Processes, how: str, said: str) -> None:
    for text in two.run(begun_unlike, how):
        assert said in text


def begun() -> tuple[ff.Program, ff.TrainState]:
    program = ff.pipelined(runs.plan_of(ONE), CUT)
    return program, program.init(seed=3)


def told(function: Any) -> str:
    try:
        return f"nothing: {function()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def measured_on_other_data(how: str) -> str:
    rank = distributed.get_rank()
    program, state = begun()
    data = [words(seed=seed) for seed in range(3)]
    if rank == 1:
        data = {"fewer": data[:1], "content": data[::-1], "broken": [data[0], 7]}[how]  # type: ignore[list-item]
    return told(lambda: program.evaluate(state, data))


@pytest.mark.parametrize("how", ["fewer", "content", "broken"])
def test_an_evaluation_of_other_data_on_one_process_is_refused_on_all(two: Processes, how: str) -> None:
    found = two.run(measured_on_other_data, how)
    for rank, text in enumerate(found):
        if how == "broken" and rank == 1:
            assert text.startswith("ValueError: cannot count the samples")
        else:
            assert "ValueError: the processes of a pipeline must be given the same batch" in text
            assert "rank 1: batches of an evaluation" in text


def measured_by_two_pipelines() -> tuple[Any, Any]:
    program = ff.pipelined(runs.plan_of(ONE), CUT, schedule="GPipe", pipelines=2)
    state = program.init(seed=3)
    first = program.evaluate(state, [words()])
    state, _ = program.step(state, words())
    return first, program.evaluate(state, [words(seed=seed) for seed in range(3)])


def test_a_pipeline_may_have_no_batch_to_measure() -> None:
    one = ff.single(runs.plan_of(ONE, transforms=()))
    state = one.init(seed=3)
    with processes(4, timeout=20) as four:
        for first, _ in four.run(measured_by_two_pipelines):
            assert first == pytest.approx(one.evaluate(state, [words()]), rel=1e-6)


class Signalling:
    """Batches; a signal comes to one process while it reads the second."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(4):
            if number == 1 and distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield words(seed=number)


def signalled() -> tuple[str, int]:
    program, state = begun()
    observed = ff.every(2, ff.evaluated(Signalling()))(program.steps(state, runs.batches(8)))
    step = 0
    try:
        for tick in observed:
            step = tick.state.step
    except ff.Preempted as error:
        return error.signal.name, step
    return "no signal", step


def test_a_signal_to_one_process_in_an_evaluation_ends_all_after_a_step(two: Processes) -> None:
    first, second = two.run(signalled)
    assert first == second
    assert first[0] == "SIGTERM"


def tried_again() -> None:
    program, state = begun()
    state, _ = program.step(state, words())
    if distributed.get_rank() == 1:

        def fail(module: torch.nn.Module, args: Any) -> None:
            raise KeyError("memory")

        handle = program.module().layer[5].register_forward_pre_hook(fail)  # type: ignore[index, union-attr]
        with pytest.raises(KeyError):
            program.step(state, words())
        handle.remove()
    program.step(state, words())


def test_a_failure_that_is_caught_does_not_leave_the_others_waiting(two: Processes) -> None:
    with pytest.raises(ProcessesFailed) as caught:
        two.run(tried_again)
    for text in caught.value.errors.values():
        assert "PeerError: rank 1 failed: KeyError: 'memory'" in text
