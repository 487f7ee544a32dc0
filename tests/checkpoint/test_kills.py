"""A training process that saves in the background is killed at random moments and goes on: the bits are the same."""

import functools
import itertools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import forgather_fn as ff
from forgather_fn.checkpoint import latest, list_checkpoints, saved, verify
from tests.checkpoint.faults import Calls, assert_same, at, forked, killed, leaves, names
from tests.checkpoint.subjects import drawing, everything, run_to

STEPS = 30


def train(run: Path, *, workers: int = 0, forwards: int | None = None):
    """Train to the end from wherever the run is, and save often; be killed at a forward pass, if one is given."""
    program = everything()
    state = program.restore(run) if latest(run) else program.init(0)
    passed = itertools.count()

    def hook(module, args):
        if next(passed) == forwards:
            os.kill(os.getpid(), signal.SIGKILL)

    program.module().register_forward_pre_hook(hook)
    return leaves(run_to(STEPS, program, state, drawing(workers=workers), ff.every(3, saved(run, keep=2))))


def killed_at_a_call(run, number, **options):
    with Calls(at(number, killed)).watched(writers=2):
        return forked(lambda: train(run, **options))


def killed_at_a_forward_pass(run, number, **options):
    return forked(lambda: train(run, forwards=number, **options))


def killed_after(run, seconds, **options):
    def kill(child):
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)

    return forked(lambda: train(run, **options), meanwhile=kill)


@functools.cache
def uninterrupted():
    program = everything()
    return leaves(run_to(STEPS, program, program.init(0), drawing()))


@functools.cache
def duration() -> float:
    """Measure how long a whole run takes, in seconds."""
    program = everything()
    begun = time.monotonic()
    run_to(STEPS, program, program.init(0), drawing())
    return time.monotonic() - begun


def kill(run: Path, draw: random.Random, **options) -> bool:
    """Kill the training at a random moment; tell whether it came to that, and not to the end before."""
    kind = draw.choice(["call", "call", "forward", "time"])
    if kind == "call":
        ended = killed_at_a_call(run, draw.randrange(200), **options)
    elif kind == "forward":
        ended = killed_at_a_forward_pass(run, draw.randrange(40), **options)
    else:
        ended = killed_after(run, draw.uniform(0, 2 * duration()), **options)
    assert ended.code in (0, -signal.SIGKILL)
    return ended.code != 0


def check(run: Path, seed: int, kills: int, **options) -> None:
    """Kill a run so often, and let it end. One that ends too early is begun anew."""
    draw, done, committed = random.Random(seed), 0, -1
    while done < kills:
        if kill(run, draw, **options):
            done += 1
            found = latest(run)
            order = found.manifest.order if found else -1
            assert order >= committed  # what was committed is never lost
            committed = order
        else:
            shutil.rmtree(run)
            run.mkdir()
            committed = -1
    assert_same(forked(lambda: train(run, **options)).value, uninterrupted())
    assert [name for name in names(run) if name.startswith(".")] == []
    assert [entry.step for entry in list_checkpoints(run)] == [STEPS - 3, STEPS]
    assert [fault for entry in list_checkpoints(run) for fault in verify(entry.path)] == []


@pytest.mark.parametrize("seed", range(5))
def test_four_kills(tmp_path, seed):
    check(tmp_path / "run", seed, kills=4)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", range(20, 40))
def test_many_kills(tmp_path, seed, workers):
    check(tmp_path / "run", seed, kills=5 + seed % 2, workers=workers)


def test_the_last_state_is_found_by_a_run_that_had_ended(tmp_path):
    expected = train(tmp_path)
    assert_same(expected, uninterrupted())
    assert_same(forked(lambda: train(tmp_path)).value, uninterrupted())
