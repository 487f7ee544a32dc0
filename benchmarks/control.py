"""The ``control`` row: a run that can be controlled from outside, against the same run that cannot."""

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import toolz
from torch import nn

import forgather_fn as ff
from benchmarks import models
from benchmarks.loops import plan_of
from benchmarks.measure import NO_DATA, Arm, Clock, Result, interleaved, ratio, spread
from benchmarks.table import Reach, Table
from benchmarks.task import Task
from forgather_fn.control import Inbox
from forgather_fn.loop import Demand, Stage

TASKS: Final = (
    Task(name="43 k parameters in 30 tensors", shape=models.SMALL, batch_size=4, warmup=20, steps=400),
    Task(name="3.3 M parameters in 54 tensors", shape=models.LARGE, batch_size=4, warmup=10, steps=60),
)
ROUNDS: Final = 9
NOISE: Final = 0.02
"""How far two measurements of the same may lie apart for anything to be said."""


def run(quick: bool) -> Iterator[Table]:
    """Measure it; quick: a few steps."""
    arms = (
        Arm("off", NO_DATA, lambda task, clock: _train(task, clock)),
        Arm("off, once more", NO_DATA, lambda task, clock: _train(task, clock)),
        Arm("on", NO_DATA, _controlled),
        Arm("on, watched", NO_DATA, lambda task, clock: _controlled(task, clock, watched=True)),
    )
    stage = _stage(100 if quick else 50_000)
    for given in TASKS:
        task, rounds = (attrs.evolve(given, warmup=1, steps=2), 1) if quick else (given, ROUNDS)
        yield _table(task, rounds, interleaved(task, arms, rounds), stage)


def _stage(count: int) -> float:
    """Measure what the stage takes between two steps, in seconds: of a stream whose steps take no time."""
    program = ff.single(plan_of(TASKS[0], lambda: Clock(TASKS[0])))
    tick = next(iter(program.steps(program.init(0), TASKS[0].batches)))

    def taken(*stages: Stage) -> float:
        nothing = ff.Steps(tick.state, [], lambda demand: itertools.repeat(tick, count))
        ticks = toolz.pipe(nothing, *stages).open(Demand())
        begun = time.perf_counter()
        for _ in ticks:
            pass
        return (time.perf_counter() - begun) / count

    return min(taken(ff.controlled(Inbox())) for _ in range(5)) - min(taken() for _ in range(5))


def _table(task: Task, rounds: int, results: list[Result], stage: float) -> Table:
    off, again, on, _ = results
    noise = min(abs(ratio(again.wall, off.wall) - 1), NOISE)
    return Table(
        title=f"Control from outside: {task.size}, {rounds} rounds of {task.steps} steps",
        notes=(
            "On: a server listens, and the loop looks between two steps whether anything was asked. Watched: another",
            "process asks for the status once a second. Off is measured twice: how far the two lie apart is noise. The",
            "stage is also measured alone, over steps that take no time.",
        ),
        columns=("run", "wall ms a step", "CPU ms a step", "wall ratio"),
        lines=tuple(
            (one.arm.name, spread(one.wall, 1e-3), spread(one.cpu, 1e-3), f"{ratio(one.wall, off.wall):.3f}")
            for one in results
        ),
        reach=(
            Reach("on, against off; the limit is 1 and the noise", ratio(on.wall, off.wall), 1 + noise),
            Reach(f"a step and the stage ({stage * 1e6:.1f} us), against the step", 1 + stage / min(off.wall), 1.01),
        ),
        results=tuple(one.as_json() for one in results),
    )


def _train(task: Task, clock: Clock, *stages: Stage) -> nn.Module:
    program = ff.single(plan_of(task, lambda: clock))
    toolz.pipe(program.steps(program.init(0), task.batches), *stages, ff.until(steps=task.updates), ff.last)
    return program.module()


def _controlled(task: Task, clock: Clock, watched: bool = False) -> nn.Module:
    """Train with the server on; its files go to a home of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="b", dir="/tmp") as home,
        _state_home(home),
        ff.serve(Path(home) / "run") as inbox,
        _watching(home) if watched else contextlib.nullcontext(),
    ):
        return _train(task, clock, ff.controlled(inbox))


@contextlib.contextmanager
def _state_home(home: str) -> Iterator[None]:
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = home
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before


@contextlib.contextmanager
def _watching(home: str) -> Iterator[None]:
    """Have another process watch, from before the first step on."""
    command = [sys.executable, "-m", "forgather_fn", "control", "watch", "run"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "XDG_STATE_HOME": home})
    assert watcher.stdout is not None
    watcher.stdout.readline()
    try:
        yield
    finally:
        watcher.kill()
        watcher.communicate()
