"""A process that fails ends all others, soon, and each says why; a process that is done ends nobody."""

import os
import signal
import sys
import time

import attrs
import pytest
import torch
from torch import distributed

from forgather_fn.distributed import watch as watch_module
from forgather_fn.distributed.watch import Watcher, watching
from forgather_fn.testing.processes import ProcessesFailed, processes
from forgather_fn.world import World

LONG = 40.0
"""Seconds for which a process is busy that nobody ends."""
SOON = 15.0
"""Seconds in which all must have ended, on a machine that has other things to do as well."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(watch_module, "GRACE", 0.3)  # what is forked within a test has it too


def watched() -> tuple[World, Watcher]:
    world = World(distributed.get_rank(), distributed.get_world_size(), control=distributed.group.WORLD)
    watch = watching(world)
    return attrs.evolve(world, watch=watch), watch


def ended(size, function, *args):
    """Run what no process of a pool survives: how each ended, and after how many seconds all had."""
    with processes(size) as pool:
        pool.pids()
        start = time.monotonic()
        with pytest.raises(ProcessesFailed) as caught:
            pool.run(function, *args)
        return caught.value.errors, time.monotonic() - start


# What processes do when another one fails.


def in_python(world):
    while True:
        sum(range(100))


def in_torch(world):
    matrix = torch.randn(300, 300)
    while True:
        matrix = torch.tanh(matrix @ matrix)


def asleep(world):
    time.sleep(LONG)


def holding_the_interpreter(world):
    while True:
        sum(range(30_000_000))  # one call in C


def in_a_collective(world):
    world.gather(None)
    time.sleep(LONG)


BUSY = [in_python, in_torch, asleep, holding_the_interpreter, in_a_collective]


# How they fail.


def raising(world, watch):
    try:
        raise ValueError("what")
    except ValueError as error:
        watch.fail(error)
    time.sleep(LONG)


def killed(world, watch):
    os.kill(os.getpid(), signal.SIGKILL)


def left_at_once(world, watch):
    os._exit(3)


HOW = {
    raising: "failed: ValueError: what\nTraceback",
    killed: "failed: it ended without",
    left_at_once: "failed: it ended",
}


def one_fails(victim, how, busy):
    world, watch = watched()
    watch.begin()
    world.gather(None)
    if world.rank == victim:
        time.sleep(0.2)
        how(world, watch)
    else:
        busy[(world.rank - victim) % len(busy)](world)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_whichever_process_fails_ends_the_others(victim, how, capfd, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LONG", 1.5)  # for the one that fails and stays
    errors, seconds = ended(3, one_fails, victim, how, [in_python, asleep])
    others = {rank: text for rank, text in errors.items() if rank != victim}
    assert set(others.values()) == {"the process ended with exit code 1"}
    assert len(others) == 2
    assert seconds < SOON
    said = capfd.readouterr().err
    assert said.startswith(f"rank {victim} {HOW[how]}")
    assert said.count(f"rank {victim} failed: ") == 2


@pytest.mark.parametrize("busy", BUSY)
def test_it_ends_them_whatever_they_do(busy, capfd):
    errors, seconds = ended(2, one_fails, 0, killed, [busy])
    assert errors[0] == "the process ended with exit code -9"
    if busy is in_a_collective:
        assert "PeerError: rank 0 failed: it ended without a word" in errors[1]
    else:
        assert errors[1] == "the process ended with exit code 1"
        assert capfd.readouterr().err.startswith("rank 0 failed: it ended without a word")
    assert seconds < SOON
