"""Trainings as values: what is assembled, how it begins, and what is refused."""

import attrs
import pytest
import torch

import forgather_fn as ff
from forgather_fn.checkpoint import CheckpointError, list_checkpoints
from forgather_fn.control import Command, jobs
from forgather_fn.control.client import ask, target
from forgather_fn.reports import jsonl, read
from forgather_fn.schedules import cosine, linear
from forgather_fn.training import Training, assembled, looks, warmed_up
from tests.toys import assert_equal

X, Y = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


def made(run, **changes):
    given = {
        "model": lambda: torch.nn.Linear(4, 3),
        "loss": ff.losses.cross_entropy,
        "optimizer": ff.adamw(),
        "data": lambda *, batch_size: ff.batches((X, Y), batch_size=batch_size),
        "eval_data": ff.batches((X, Y), batch_size=40),
        "run": run,
        "max_steps": 7,
        "batch_size": 5,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "eval_steps": 3,
        "save_steps": 3,
        "sinks": [jsonl(run / "metrics.jsonl")],
    }
    return assembled(**{**given, **changes})


def test_a_training_evaluates_reports_saves_and_stops(tmp_path):
    seen = []
    final = made(tmp_path, observers=[lambda tick: seen.append(tick.results["eval_loss"])]).train()
    assert final.step == 7
    rows = read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 3, 6, 7]
    assert [row["eval_loss"] for row in rows] == seen
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [3, 6, 7]


def test_it_is_the_loop_that_one_would_write(tmp_path):
    plan = ff.Plan(
        model=lambda: torch.nn.Linear(4, 3),
        loss=ff.losses.cross_entropy,
        optimizer=ff.adamw(),
        schedule=cosine(peak=1e-2, warmup=0, total=7, final=0.0),
        transforms=(ff.clipped(1.0),),
    )
    program = ff.single(plan)
    data = ff.batches((X, Y), batch_size=5)
    expected = ff.last(ff.until(steps=7)(program.steps(program.init(3), data)))
    assert_equal(made(tmp_path, seed=3).train(), expected)


def test_it_goes_on_where_it_was(tmp_path):
    expected = made(tmp_path / "whole").train()
    stopped = made(tmp_path / "parts", stages=[ff.until(steps=4)])
    assert stopped.train(resume=True).step == 4
    training = made(tmp_path / "parts")
    assert training.state(resume=True).step == 4
    assert training.state().step == 0
    assert_equal(training.train(resume=True), expected)
    elsewhere = made(tmp_path / "elsewhere")
    assert elsewhere.state(tmp_path / "parts/checkpoints/checkpoint-3").step == 3


def test_another_plan_is_refused_unless_allowed(tmp_path):
    made(tmp_path, max_steps=3).train()
    changed = made(tmp_path, optimizer=ff.adamw(weight_decay=0.5), max_steps=3)
    with pytest.raises(CheckpointError, match="made by another plan"):
        changed.state(resume=True)
    assert changed.state(resume=True, allow={"optimizer"}).step == 3


def test_a_training_is_a_value(tmp_path):
    training = made(str(tmp_path) and tmp_path)
    assert isinstance(training, Training)
    assert attrs.evolve(training, seed=1).seed == 1
    assert not list(tmp_path.iterdir())  # nothing is opened before it runs


def test_no_clipping_and_no_evaluation(tmp_path):
    training = made(tmp_path, max_grad_norm=None, eval_data=None)
    assert training.program.plan.transforms == ()
    training.train()
    assert all("eval_loss" not in row for row in read(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("total", "share", "rise"),
    [
        (900, 0.1, 90),
        (21, 0.1, 2),
        (20, 0.1, 2),
        (70, 0.1, 7),
        (3, 0.1, 0),
        (100, 0.29, 29),
        (100, 0.57, 57),
        (9, 0.3, 3),
    ],
)
def test_a_warm_up_is_a_share_rounded_to_whole_steps(total, share, rise):
    """``100 * 0.29`` is a little less than 29."""
    schedule = warmed_up(linear, peak=1.0, total=total, warmup=share, final_div_factor=4)
    assert repr(schedule) == f"linear(peak=1.0, warmup={rise}, total={total}, final=0.25)"


@pytest.mark.parametrize("wrong", [{"warmup": -0.1}, {"warmup": 1.5}, {"final_div_factor": 0.5}])
def test_a_share_out_of_its_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        warmed_up(cosine, peak=1.0, total=10, **wrong)


@pytest.mark.parametrize("wrong", [(0, 3), (3, 0)])
def test_looks_are_counted_from_one(wrong):
    assert sorted(looks(3, 3)) == [1, 3]
    with pytest.raises(ValueError, match="at least 1"):
        looks(*wrong)


def test_it_can_be_controlled_while_it_runs(tmp_path):
    answers = []

    def observe(tick):
        if tick.state.step == 2:
            (job,) = jobs.list_jobs()
            answers.append(job.endpoint.run)
            answers.append(ask(target(job.endpoint), Command.STOP, wait=False))

    assert made(tmp_path, observers=[observe], eval_steps=2).train().step == 2
    assert answers == [str(tmp_path), {"command": "stop", "accepted": True}]
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [2]
    assert jobs.list_jobs() == []
