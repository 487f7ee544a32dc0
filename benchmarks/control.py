"""The ``control`` row: a run that can be controlled from outside, against the same run that cannot."""

import contextlib
import os
import subprocess
import sys
import tempfile
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
    for given in TASKS:
        task, rounds = (attrs.evolve(given, warmup=1, steps=2), 1) if quick else (given, ROUNDS)
        yield _table(task, rounds, interleaved(task, arms, rounds))


def _table(task: Task, rounds: int, results: list[Result]) -> Table:
    off, again, on, _ = results
    noise = min(abs(ratio(again.wall, off.wall) - 1), NOISE)
    return Table(
        title=f"Control from outside: {task.size}, {rounds} rounds of {task.steps} steps",
        notes=(
            "On: a server listens, and the loop looks between two steps whether anything was asked. Watched: another",
            "process asks for the status once a second. Off is measured twice: how far the two lie apart is noise.",
        ),
        columns=("run", "wall ms a step", "CPU ms a step", "wall ratio"),
        lines=tuple(
            (one.arm.name, spread(one.wall, 1e-3), spread(one.cpu, 1e-3), f"{ratio(one.wall, off.wall):.3f}")
            for one in results
        ),
        reach=(Reach("on, against off; the limit is 1 and the noise", ratio(on.wall, off.wall), 1 + noise),),
        results=tuple(one.as_json() for one in results),
    )


def _train(task: Task, clock: Clock, *stages: ff.loop.Stage) -> nn.Module:
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
