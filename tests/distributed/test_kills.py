"""Processes of a run fail at random moments; all end, nothing saved is lost, and the run goes on to the bit."""

import functools
import itertools
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import toolz

import forgather_fn as ff
from forgather_fn.checkpoint import latest, list_checkpoints, verify
from forgather_fn.distributed import watch
from forgather_fn.testing.processes import ProcessesFailed, processes
from tests.laws.test_worlds import plan, recorded, rows, unlike

STEPS = 12
SOON = 20.0
"""Seconds in which all must have ended, on a machine that has other things to do as well."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(watch, "GRACE", 0.5)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def fail() -> None:
    raise ValueError("planted")


HOW = {"kill": kill, "leave": leave, "raise": fail}


def train(run: str, victim: int, how: str, forwards: int | None, seconds: float | None) -> dict[str, Any]:
    """Train to the end from wherever the run is; one process fails at a forward pass, or after some time."""
    program = ff.accelerated(plan(), reduction="tree")
    state = program.restore(run) if list_checkpoints(run) else program.init(seed=1)
    if program.world.rank == victim:
        passed = itertools.count()
        program.module().register_forward_pre_hook(lambda *_: HOW[how]() if next(passed) == forwards else None)
        if seconds is not None:
            timer = threading.Timer(seconds, HOW[how])
            timer.daemon = True
            timer.start()
    steps = program.steps(state, ff.batches(rows(), batch_size=10, last="ragged"))
    return recorded(toolz.pipe(steps, ff.every(2, ff.saved(run, keep=2)), ff.until(steps=STEPS), ff.last), [])


@functools.cache
def uninterrupted() -> tuple[dict[str, Any], float]:
    """Run from the beginning to the end, and measure the seconds."""
    program = ff.accelerated(plan(), reduction="tree")
    begun = time.monotonic()
    steps = program.steps(program.init(seed=1), ff.batches(rows(), batch_size=10, last="ragged"))
    return recorded(toolz.pipe(steps, ff.until(steps=STEPS), ff.last), []), time.monotonic() - begun


def failed(size: int, run: Path, victim: int, *failure: Any) -> bool:
    """Run until a process fails, if it comes to that, and see that all have ended soon."""
    with processes(size, timeout=SOON) as pool:
        pool.pids()
        begun = time.monotonic()
        try:
            pool.run(train, str(run), victim, *failure)
        except ProcessesFailed as error:
            errors = error.errors
        else:
            return False
    assert time.monotonic() - begun < SOON
    assert not any("no answer" in text for text in errors.values())
    return True


def check(run: Path, sizes: list[int], draw: random.Random, kills: int) -> None:
    """Let processes fail so often, and the run end. One that ends too early is begun anew."""
    done, committed = 0, -1
    while done < kills:
        size, how = draw.choice(sizes), draw.choice(list(HOW))
        by_time = how != "raise" and draw.random() < 0.5
        moment = (None, draw.uniform(0, 4 * uninterrupted()[1])) if by_time else (draw.randrange(60), None)
        if failed(size, run, draw.randrange(size), how, *moment):
            done += 1
            found = latest(run)
            order = found.manifest.order if found and found.manifest else -1
            assert order >= committed  # what was committed is never lost
            committed = order
            assert [fault for entry in list_checkpoints(run) if entry.whole for fault in verify(entry.path)] == []
        else:
            shutil.rmtree(run)
            committed = -1
    with processes(draw.choice(sizes)) as pool:
        for rank in pool.run(train, str(run), -1, "kill", None, None):
            assert unlike(uninterrupted()[0], rank, 0.0) == []


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_fails_in_a_step_is_named_and_the_run_goes_on(tmp_path, victim, how, capfd):
    assert failed(2, tmp_path / "run", victim, how, 18, None)
    said = capfd.readouterr().err
    assert set(re.findall(r"^rank (\d) failed: ", said, re.MULTILINE)) == {str(victim)}
    assert ("failed: ValueError: planted" in said) is (how == "raise")
    found = latest(tmp_path / "run")
    assert found is not None
    assert 0 < found.step < STEPS
    with processes(2) as pool:
        for rank in pool.run(train, str(tmp_path / "run"), -1, how, None, None):
            assert unlike(uninterrupted()[0], rank, 0.0) == []


@pytest.mark.parametrize("seed", range(2))
def test_failures_at_random_moments(tmp_path, seed):
    check(tmp_path / "run", [1, 2, 4], random.Random(seed), kills=2)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 40))
def test_many_failures_at_random_moments(tmp_path, seed):
    check(tmp_path / "run", [1, 2, 4], random.Random(seed), kills=6)
