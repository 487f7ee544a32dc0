"""The ``everything`` row: what reports, asynchronous saves and evaluations take together, of a step of usual size."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import toolz
from torch import nn

import forgather_fn as ff
from benchmarks import models
from benchmarks.arms import ALONE, OURS
from benchmarks.loops import plan_of
from benchmarks.measure import NO_DATA, Arm, Clock, interleaved, ratio, spread
from benchmarks.table import Reach, Table
from benchmarks.task import Task
from forgather_fn.reports import jsonl, tensorboard

TASK = Task(name="3.3 M parameters in 54 tensors", shape=models.LARGE, batch_size=4, warmup=10, steps=100)
ROUNDS: Final = 9
LOOK: Final = 100
"""Steps between two saves, and between two evaluations."""


def run(quick: bool) -> Iterator[Table]:
    """Measure it; quick: a few steps."""
    task, rounds = (attrs.evolve(TASK, warmup=1, steps=2), 1) if quick else (TASK, ROUNDS)
    everything = Arm(f"{OURS}, everything on", NO_DATA, by_everything)
    bare, ours, all_on = interleaved(task, (*ALONE, everything), rounds)
    yield Table(
        title=f"Everything on: {task.size}, {rounds} rounds of {task.steps} steps",
        notes=(
            f"On: JSON lines and TensorBoard every step; every {LOOK}, an asynchronous save of 40 MB and an evaluation",
            "of as many samples as a step has. Wall time says what saves beside the training cost; so does CPU time.",
        ),
        columns=("loop", "wall ms a step", "CPU ms a step", "wall ratio"),
        lines=tuple(
            (one.arm.name, spread(one.wall, 1e-3), spread(one.cpu, 1e-3), f"{ratio(one.wall, bare.wall):.3f}")
            for one in (bare, ours, all_on)
        ),
        reach=(Reach("everything on, against the bare hand-written loop", ratio(all_on.wall, bare.wall), 1.01),),
        results=tuple(one.as_json() for one in (bare, ours, all_on)),
    )


def by_everything(task: Task, clock: Clock) -> nn.Module:
    """Train with all that a long run has on."""
    program = ff.single(plan_of(task, lambda: clock))
    rows = task.held_out[: task.batch_size]
    held_out = {"input_ids": rows, "labels": rows}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        toolz.pipe(
            program.steps(program.init(0), task.batches),
            ff.every(LOOK, ff.evaluated([held_out])),
            ff.every(1, ff.report(jsonl(run / "metrics.jsonl"), tensorboard(run / "events"))),
            ff.every(LOOK, ff.saved(run)),
            ff.until(steps=task.updates),
            ff.last,
        )
    return program.module()
