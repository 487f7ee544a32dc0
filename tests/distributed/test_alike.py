"""Processes that do not take the same steps, on the same batches, of the same program, are told before they mix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import forgather_fn as ff
from forgather_fn import alike
from forgather_fn.checkpoint import save, saved
from forgather_fn.distributed import watch
from forgather_fn.testing.processes import Processes, ProcessesFailed, processes
from tests.distributed.test_alone import SOON, STRATEGIES, plan, rows

Batches = list[Any]
STEPS = {**STRATEGIES, "overlapped": lambda plan: ff.accelerated(plan, overlap_bytes=0)}


@pytest.fixture(scope="module")
def pair() -> Any:
    with processes(2) as pool:
        yield pool


def batches(form: str, program: ff.Program) -> Batches:
    """Give the same samples as plain batches, and as those of a stream, of which a process reads its part."""
    if form == "plain":
        return rows()
    data = {name: torch.cat([batch[name] for batch in rows()]) for name in rows()[0]}
    stream = ff.batches(data, batch_size=4, epochs=1, order="sequential")
    return list(stream.start(0, 0, program.share))


def left_out(program: ff.Program, state: ff.TrainState, given: Batches) -> ff.TrainState:
    for number, batch in enumerate(given):
        if number == 1 and not program.world.main:
            continue
        state, _ = program.step(state, batch)
    return state


def taken_twice(program: ff.Program, state: ff.TrainState, given: Batches) -> ff.TrainState:
    for number, batch in enumerate([given[0], *given]):
        if number or program.world.main:
            state, _ = program.step(state, batch)
    return state


def swapped(program: ff.Program, state: ff.TrainState, given: Batches) -> ff.TrainState:
    for batch in given if program.world.main else given[::-1]:
        state, _ = program.step(state, batch)
    return state


def unlike(strategy: str, form: str, walk: Callable[..., ff.TrainState]) -> tuple[str, int, float]:
    program = STEPS[strategy](plan())
    state, kept = program.init(0), []

    def step(state: ff.TrainState, batch: Any) -> tuple[ff.TrainState, Any]:
        kept[:] = [state]
        return program.step(state, batch)

    text = ""
    try:
        walk(attrs.evolve(program, step=step), state, batches(form, program))
    except ValueError as error:
        text = str(error)
    (state,) = kept
    return text, state.step, float(sum(tensor.sum() for tensor in state.params.values()))


@pytest.mark.parametrize("walk", [left_out, taken_twice, swapped])
@pytest.mark.parametrize("form", ["plain", "stream"])
@pytest.mark.parametrize("strategy", STEPS)
def test_a_step_of_other_batches_is_refused_on_all(
    pair: Processes, strategy: str, form: str, walk: Callable[..., ff.TrainState]
) -> None:
    if (strategy, form) == ("pipeline", "stream"):
        form = "plain"  # each of its processes is given the whole batch
    (one, *_), (other, *_) = pair.run(unlike, strategy, form, walk)
    assert one == other
    why, first, second = one.splitlines()
    assert why.startswith(("the processes of a run must take the same steps", "the processes of a pipeline must be"))
    assert first.startswith("  rank 0: step ")
    assert second.startswith("  rank 1: step ")
    assert first.removeprefix("  rank 0") != second.removeprefix("  rank 1")


def went_on(strategy: str) -> tuple[bool, float]:
    program = STEPS[strategy](plan())
    first, second, third = rows()
    state, _ = program.step(program.init(0), first)
    with pytest.raises(ValueError, match="rank 1"):
        program.step(state, second if program.world.main else third)
    for batch in (second, third):
        state, _ = program.step(state, batch)
    return program.world.main, program.evaluate(state, rows())["loss"]


@pytest.mark.parametrize("strategy", STEPS)
def test_after_it_all_may_go_on_as_if_nothing_had_been(pair: Processes, strategy: str) -> None:
    single = ff.single(plan())
    state = single.init(0)
    for batch in rows():
        state, _ = single.step(state, batch)
    expected = single.evaluate(state, rows())["loss"]
    assert pair.run(went_on, strategy) == [(True, pytest.approx(expected)), (False, pytest.approx(expected))]


def rounded(strategy: str) -> bool:
    program = STEPS[strategy](plan())
    state = program.init(0)
    for batch in rows():
        made = {name: tensor * (1 + 1e-6 * program.world.rank) for name, tensor in batch.items()}
        state, _ = program.step(state, made)
    return state.step == 3


@pytest.mark.parametrize("strategy", ["replicas", "shards"])
def test_what_each_computes_by_itself_may_differ_by_rounding(pair: Processes, strategy: str) -> None:
    assert pair.run(rounded, strategy) == [True, True]


def in_another_order(strategy: str, what: str) -> None:
    one, other = (STEPS[strategy](plan()) for _ in range(2))
    first, second = one.init(0), other.init(1)
    for batch in rows()[:2]:
        first, _ = one.step(first, batch)
        second, _ = other.step(second, batch)
    order = [(one, first), (other, second)]
    for program, state in order if one.world.main else order[::-1]:
        if what == "a step":
            program.step(state, rows()[2])
        else:
            program.evaluate(state, rows())


@pytest.mark.parametrize("what", ["a step", "an evaluation"])
@pytest.mark.parametrize("strategy", STEPS)
def test_two_programs_in_another_order_are_refused(
    strategy: str, what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.5)
    with processes(2, timeout=SOON) as pool, pytest.raises(ProcessesFailed) as failed:
        pool.run(in_another_order, strategy, what)
    said = capfd.readouterr().err + str(failed.value)
    assert f"begins {what} of program 2" in said
    assert f"begins {what} of program 1" in said
    assert "(program 1 is the one that was initialised first)" in said


def in_turn(strategy: str) -> list[float]:
    programs = [STEPS[strategy](plan()) for _ in range(2)]
    states = [program.init(seed) for seed, program in enumerate(programs)]
    for batch in rows():
        for number, program in enumerate(programs):
            states[number], _ = program.step(states[number], batch)
    return [program.evaluate(state, rows())["loss"] for program, state in zip(programs, states, strict=True)]


@pytest.mark.parametrize("strategy", STEPS)
def test_two_programs_in_turn_are_what_each_is_alone(pair: Processes, strategy: str) -> None:
    expected = []
    for seed in range(2):
        program = ff.single(plan())
        state = program.init(seed)
        for batch in rows():
            state, _ = program.step(state, batch)
        expected.append(pytest.approx(program.evaluate(state, rows())["loss"]))
    assert pair.run(in_turn, strategy) == [expected, expected]


def other_data(program: ff.Program, state: ff.TrainState) -> Any:
    generator = torch.Generator().manual_seed(program.world.rank)
    return program.evaluate(state, [{name: torch.randn(4, 8, generator=generator) for name in ("input", "target")}] * 2)


def other_streams(program: ff.Program, state: ff.TrainState) -> Any:
    generator = torch.Generator().manual_seed(program.world.rank)
    data = {name: torch.randn(12, 8, generator=generator) for name in ("input", "target")}
    return program.evaluate(state, ff.batches(data, batch_size=4))


def more_batches(program: ff.Program, state: ff.TrainState) -> Any:
    return program.evaluate(state, rows()[: 3 - program.world.rank])


def longer_streams(program: ff.Program, state: ff.TrainState) -> Any:
    data = {name: torch.ones(12 - program.world.rank, 8) for name in ("input", "target")}
    return program.evaluate(state, ff.batches(data, batch_size=4))


def longer_sources(program: ff.Program, state: ff.TrainState) -> Any:
    samples = [{name: torch.ones(8) for name in ("input", "target")}] * (12 - 4 * program.world.rank)
    return program.evaluate(state, ff.batches(iter_of(samples), batch_size=4, order="sequential"))


def iter_of(samples: list[Any]) -> Any:
    class Source(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(samples)

    return Source()


def another_step(program: ff.Program, state: ff.TrainState) -> Any:
    following, _ = program.step(state.copy(), rows()[0])
    return program.evaluate(state if program.world.main else following, rows())


def other_parameters(program: ff.Program, state: ff.TrainState) -> Any:
    state = state.copy()
    if program.world.rank:
        next(iter(state.params.values())).mul_(2.0)
    return program.evaluate(state, rows())


def other_metrics(program: ff.Program, state: ff.TrainState) -> Any:
    return program.evaluate(state, rows(), metrics=[[absolute, largest], [largest, absolute]][program.world.rank])


def absolute(outputs: Any, batch: Any) -> Any:
    return {"absolute": ff.mean.of((outputs - batch["target"]).abs())}


def largest(outputs: Any, batch: Any) -> Any:
    return {"largest": ff.mean.of((outputs - batch["target"]).amax(1))}


UNLIKE = [other_data, other_streams, more_batches, longer_streams, longer_sources, another_step, other_metrics]


def evaluated(strategy: str, evaluate: Callable[..., Any]) -> str:
    program = STRATEGIES[strategy](plan())
    state, _ = program.step(program.init(0), rows()[0])
    try:
        evaluate(program, state)
    except ValueError as error:
        again = program.evaluate(state, rows())  # nothing is left behind of it
        assert again == program.evaluate(state, rows())
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("strategy", "evaluate"),
    [*((strategy, one) for strategy in STRATEGIES for one in UNLIKE), ("replicas", other_parameters)],
)
def test_an_evaluation_of_other_things_is_refused(pair: Processes, strategy: str, evaluate: Callable[..., Any]) -> None:
    one, other = pair.run(evaluated, strategy, evaluate)
    assert one == other
    assert one.startswith(
        ("evaluate: the processes of a run must", "the processes of a pipeline must be given the same")
    )
    assert [line[:8] for line in one.splitlines()[1:]] == ["  rank 0", "  rank 1"]


def with_few_batches(strategy: str) -> list[float]:
    program = STRATEGIES[strategy](plan())
    state = program.init(0)
    data = {name: rows()[0][name] for name in rows()[0]}
    stream = ff.batches(data, batch_size=4)
    return [program.evaluate(state, one)["loss"] for one in (rows()[:1], stream, iter(rows()[:1]))]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_process_that_has_no_batch_has_seen_the_first(pair: Processes, strategy: str) -> None:
    one, other = pair.run(with_few_batches, strategy)
    assert one == other
    assert len(set(one)) == 1


def saved_elsewhere(run: str, how: str) -> str:
    program = ff.accelerated(plan())
    own = f"{run}-{program.world.rank}"
    try:
        if how == "save":
            save(program, program.init(0), own)
        else:
            ff.last(ff.every(1, saved(own))(program.steps(program.init(0), rows())))
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("how", ["save", "saved"])
def test_a_save_to_another_place_is_refused(pair: Processes, how: str, tmp_path: Path) -> None:
    one, other = pair.run(saved_elsewhere, str(tmp_path / "run"), how)
    assert one == other
    assert one.startswith("the processes of a run save together")
    assert [line[-5:] for line in one.splitlines()[1:]] == ["run-0", "run-1"]
    assert list(tmp_path.iterdir()) == []


KINDS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.uint8, torch.uint16, torch.bool),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (40, 3), (3, 5, 1000)])
def test_all_kinds_of_data_are_looked_at(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape).to(kind)
    found = alike.content({"x": ones, "name": "a", "nothing": None, "more": [ones]})
    assert any(found) is bool(ones.numel())
    assert found == alike.content({"x": ones.clone(), "more": [ones]})
    if ones.numel():
        assert found != alike.content({"x": torch.zeros(shape).to(kind), "more": [ones]})


def test_few_numbers_of_a_large_batch_are_looked_at_in_all_columns() -> None:
    marked = torch.zeros(256, 64, dtype=torch.long)
    marked[:, 1:] = 1  # as where each row begins with the same token
    assert 64 <= alike.content(marked)[0] <= 2 * 256


def test_what_is_not_finite_is_no_difference() -> None:
    data = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    assert alike.content(data) == (0, 1.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [((0.0, 0.0, 0.05), True), ((0.0, 0.0, 0.2), False), ((0.0, 1.0, 0.0), False), ((1.0, 0.0, 0.0), False)],
)
def test_only_floating_numbers_may_be_rounded(change: tuple[float, ...], expected: bool) -> None:
    row = torch.tensor([2.0**53 - 2, 1000.0, 100.0], dtype=torch.float64)
    rows = torch.stack([row, row, row + torch.tensor(change, dtype=torch.float64)])
    assert bool(alike.same(rows)) is expected
