"""What takes all processes and is begun by one alone is refused at once, by name; nobody waits for ever."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn import mean
from forgather_fn.checkpoint import save
from forgather_fn.distributed import watch
from forgather_fn.testing.processes import ProcessesFailed, processes


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


def model() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(Residual(), Residual()) for _ in range(4)])


def loss(outputs: Tensor, batch: dict[str, Tensor]) -> ff.Mean:
    return mean.of((outputs - batch["target"]).square())


def plan() -> ff.Plan:
    return ff.Plan(model=model, loss=loss, optimizer=ff.sgd(), schedule=0.01, microbatches=2)


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(4, 8, generator=generator) for name in ("input", "target")} for _ in range(3)]


STRATEGIES: dict[str, Callable[[ff.Plan], ff.Program]] = {
    "replicas": ff.accelerated,
    "shards": lambda plan: ff.accelerated(plan, sharded=True),
    "pipeline": lambda plan: ff.pipelined(plan, split_spec="auto", schedule="GPipe"),
}
ALONE: dict[str, Callable[[ff.Program, ff.TrainState, list[Any], str], Any]] = {
    "an evaluation": lambda program, state, batches, run: program.evaluate(state, batches[:2]),
    "a save": lambda program, state, batches, run: save(program, state, run),
    "a load": lambda program, state, batches, run: program.restore(run),
    "a call of apply": lambda program, state, batches, run: program.apply(state, batches[0]["input"]),
    "the gathering of a state": lambda program, state, batches, run: program.whole(state),
    "an export": lambda program, state, batches, run: program.export(state),
}
SOON = 20.0
"""Seconds in which all must have ended, on a machine that has other things to do as well."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.5)


def one_alone(strategy: str, what: str, run: str, rank: int) -> None:
    program = STRATEGIES[strategy](plan())
    state, _ = program.step(program.init(0), rows()[0])
    save(program, state, run)
    if program.world.rank == rank:
        ALONE[what](program, state, rows(), run)
    for batch in rows():
        state, _ = program.step(state, batch)


ANYWHERE = ("an evaluation", "a save", "a load")
CUT = (*ANYWHERE, "a call of apply", "an export")
CASES = [
    *[("replicas", what) for what in ANYWHERE],
    *[("shards", what) for what in (*CUT, "the gathering of a state")],
    *[("pipeline", what) for what in CUT],
]


@pytest.mark.parametrize(("strategy", "what"), CASES)
def test_one_process_alone_is_refused(
    strategy: str, what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    with processes(2, timeout=SOON) as pool, pytest.raises(ProcessesFailed) as failed:
        pool.run(one_alone, strategy, what, str(tmp_path / "run"), 0)
    assert time.monotonic() - begun < SOON
    said = capfd.readouterr().err + str(failed.value)
    assert f"rank 0 begins {what} (" in said
    assert "where rank 1 begins a step: every process of a run takes part" in said


def observed_by_one(strategy: str) -> None:
    program = STRATEGIES[strategy](plan())
    steps = program.steps(program.init(0), rows())
    if program.world.main:
        steps = ff.every(1, ff.evaluated(rows()))(steps)
    ff.last(steps)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_observer_on_one_process_is_refused(strategy: str, capfd: pytest.CaptureFixture[str]) -> None:
    with processes(2, timeout=SOON) as pool, pytest.raises(ProcessesFailed) as failed:
        pool.run(observed_by_one, strategy)
    said = capfd.readouterr().err + str(failed.value)
    assert "rank 0 begins an evaluation (" in said


def before_the_first_batch(dispatch: Any) -> None:
    program = ff.accelerated(plan(), dispatch=dispatch)
    state = program.init(0)
    if program.world.main:
        program.evaluate(state, rows())
    ff.last(program.steps(state, rows()))


def before_a_later_batch(dispatch: Any) -> None:
    program = ff.accelerated(plan(), dispatch=dispatch)
    for tick in program.steps(program.init(0), rows()):
        if program.world.main and tick.state.step == 2:
            program.evaluate(tick.state, rows())


def at_the_end(run: str) -> None:
    program = ff.accelerated(plan())
    for tick in ff.every(1, ff.saved(run))(program.steps(program.init(0), rows())):
        if program.world.main and tick.state.step == 3:
            program.evaluate(tick.state, rows())


def begun_by_one_alone(run: str) -> None:
    program = ff.accelerated(plan())
    if program.world.main:
        program.restore(run)
    else:
        program.init(0)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (before_the_first_batch, "each"),
        (before_the_first_batch, "rank0"),
        (before_a_later_batch, "each"),
        (before_a_later_batch, "rank0"),
        (at_the_end, None),
        (begun_by_one_alone, None),
    ],
)
def test_wherever_the_others_are(
    function: Callable[[Any], None], argument: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    with processes(2, timeout=SOON) as pool, pytest.raises(ProcessesFailed) as failed:
        pool.run(function, str(tmp_path / "run") if argument is None else argument)
    assert time.monotonic() - begun < SOON
    assert "every process of a run takes part" in capfd.readouterr().err + str(failed.value)


def saved_after_all_have_failed(run: str) -> int:
    program = ff.accelerated(plan())
    state = program.init(0)
    state, _ = program.step(state, rows()[0])

    def fail(*_: Any) -> None:
        time.sleep(0.3 * program.world.rank)  # the others still compute when the first one saves
        raise MemoryError("planted")

    with program.module().register_forward_pre_hook(fail), contextlib.suppress(MemoryError):
        program.step(state, rows()[1])
    save(program, state, run)
    program.step(state, rows()[1])
    return 1


def test_all_may_save_after_a_step_that_failed_on_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with processes(2, timeout=SOON) as pool:
        assert pool.run(saved_after_all_have_failed, str(tmp_path / "run")) == [1, 1]
    assert capfd.readouterr().err == ""


def apply_alone() -> float:
    program = ff.accelerated(plan())
    state, _ = program.step(program.init(0), rows()[0])
    if program.world.main:
        program.export(state)(rows()[0]["input"])
        program.apply(state, rows()[0]["input"])
    for batch in rows():
        state, metrics = program.step(state, batch)
    return float(metrics["loss"])


def test_replicas_may_be_called_alone() -> None:
    with processes(2) as pool:
        one, other = pool.run(apply_alone)
    assert one == other


def tried_again() -> float:
    program = ff.accelerated(plan())
    state = program.init(0)
    planted = [None] * program.world.rank

    def fail(*_: Any) -> None:
        if planted:
            planted.pop()
            raise MemoryError("planted")

    program.module().register_forward_pre_hook(fail)
    for batch in rows():
        try:
            state, _ = program.step(state, batch)
        except MemoryError:
            state, _ = program.step(state, batch)
    return program.evaluate(state, rows())["loss"]


def test_a_step_that_one_process_tries_again_is_the_same_step() -> None:
    with processes(2, timeout=SOON) as pool:
        one, other = pool.run(tried_again)
    assert one == other
