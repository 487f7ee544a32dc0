"""A cursor is that of the whole job: any number of processes goes on at it, each reading, or one for all."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toolz
import torch

import forgather_fn as ff
from forgather_fn import testing, tree
from forgather_fn.testing.compare import snapshot
from forgather_fn.testing.processes import Processes, processes
from tests import specimens
from tests.pieces.data import Source, iterated

STEPS = 5


def run_to(steps: int, dispatch: str, start: str | None = None, save: str | None = None) -> dict[str, Any]:
    plan = ff.Plan(
        model=specimens.mlp,
        loss=ff.losses.cross_entropy,
        optimizer=ff.adamw(),
        schedule=0.1,
        microbatches=4,
        precision="float64",
    )
    program = ff.accelerated(plan, reduction="tree", dispatch=dispatch)
    state = program.init(0) if start is None else program.restore(start)
    steps_of = program.steps(state, iterated(Source(), threads=1))
    if save is not None:
        steps_of = ff.every(steps, ff.saved(save))(steps_of)
    final = toolz.pipe(steps_of, ff.until(steps=steps), ff.last)
    return snapshot(final.as_tree())


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    with processes(2) as two:
        yield two


@pytest.mark.parametrize("dispatch", ["each", "rank0"])
def test_two_processes_train_as_one(pair: Processes, dispatch: str) -> None:
    expected = run_to(STEPS, "each")
    for found in pair.run(run_to, STEPS, dispatch):
        assert tree.difference(expected, found) is None


@pytest.mark.parametrize("dispatch", ["each", "rank0"])
def test_a_run_goes_on_with_another_number_of_processes(pair: Processes, dispatch: str, tmp_path: Path) -> None:
    expected = run_to(STEPS, "each")
    run_to(2, "each", None, str(tmp_path))
    for found in pair.run(run_to, STEPS, dispatch, str(tmp_path)):
        assert tree.difference(expected, found) is None


def test_the_law_of_samples_by_number_is_not_for_cursors() -> None:
    with pytest.raises(ValueError, match="check_resume"):
        testing.check_data(iterated(Source()))


def test_a_plain_batch_leaves_no_cursor() -> None:
    program = ff.single(ff.Plan(model=specimens.mlp, loss=ff.losses.cross_entropy, optimizer=ff.sgd(), schedule=0.1))
    (batch,) = itertools.islice(iterated(Source()).start(0, 0), 1)
    state, _ = program.step(program.init(0), batch)
    assert state.cursor == batch.cursor
    assert state.copy().cursor == batch.cursor
    state, _ = program.step(state, (torch.zeros(2, 5), torch.tensor([0, 1])))
    assert state.cursor is None


def test_a_state_of_several_models_keeps_the_cursor(tmp_path: Path) -> None:
    plan = ff.Plan(model=specimens.mlp, loss=ff.losses.cross_entropy, optimizer=ff.sgd(), schedule=0.1)

    def step(programs: Any, states: Any, batch: Any) -> Any:
        states["one"], metrics = programs["one"].step(states["one"], batch)
        return states, metrics

    def program() -> ff.Program:
        return ff.joined({"one": plan, "other": plan}, step)

    made = program()
    ticks = ff.every(2, ff.saved(tmp_path))(made.steps(made.init(0), iterated(Source())))
    expected = ff.last(ff.until(steps=4)(ticks))
    assert expected.cursor is not None
    again = program()
    found = ff.last(
        ff.until(steps=4)(again.steps(again.restore(tmp_path / "checkpoints" / "checkpoint-2"), iterated(Source())))
    )
    assert ff.difference(expected, found) is None


def test_a_step_of_it_is_replayed(tmp_path: Path) -> None:
    plan = ff.Plan(model=specimens.mlp, loss=ff.losses.cross_entropy, optimizer=ff.sgd(), schedule=0.1)
    program = ff.single(plan)
    ticks = ff.every(2, ff.saved(tmp_path))(program.steps(program.init(0), iterated(Source())))
    losses = [float(tick.metrics["loss"]) for tick in ff.until(steps=4)(ticks)]
    found = ff.checkpoint.replay(ff.single(plan), tmp_path, iterated(Source()), step=3)
    assert found.metrics["loss"] == losses[3]
    assert found.indices is None


@pytest.mark.gpu
def test_batches_are_pinned() -> None:
    stream = ff.batches(lambda: iter(range(9)), batch_size=2, order="sequential", pin_memory=True, threads=1)
    assert next(stream.start(0, 0)).data.is_pinned()
