"""The ``memory`` row: the most memory that torch holds at one time while an arm trains.

Every allocation and release of torch's CPU allocator is recorded by torch's profiler, from before the model is built to
the end of the run. The peak of their running sum is exact to the byte, and the same in every run. Resident memory is
neither: it begins with 300 MB of libraries, and keeps what the C library does not give back. Not seen is what does not
pass through that allocator: Python's own objects, and scratch memory of kernels, which are the same in every arm.
"""

from collections.abc import Iterator
from typing import Final

import attrs
from torch import nn

from benchmarks import compiled, estimates, vocabulary
from benchmarks.arms import LOADED, OURS, PEERS_LOADED, installed, left_out
from benchmarks.measure import Arm, Clock, check_losses, most_held
from benchmarks.overhead import DEEP, LARGE, SMALL
from benchmarks.table import Reach, Table
from benchmarks.task import Task

LIMITS: Final = {LARGE: 1.02}
"""Against the hand-written loop. On smaller models gradients stay in place between steps, which is faster and takes
their size more while the model runs: 4 bytes a parameter."""


def run(quick: bool) -> Iterator[Table]:
    """Measure each model; quick: the smallest, without peers."""
    for task in (SMALL,) if quick else (SMALL, DEEP, LARGE):
        short = attrs.evolve(task, warmup=2, steps=3)
        arms = LOADED if quick else (*LOADED, *compiled.memory_arms(), *installed(PEERS_LOADED))
        held = [(arm, *peak(arm, short)) for arm in arms]
        check_losses((arm, short.loss(model)) for arm, _, model in held)
        base = held[0][1]
        peaks = {arm.name: peak for arm, peak, _ in reversed(held)}
        goals = [name for name in (OURS, compiled.WHOLE) if task in LIMITS and name in peaks]
        yield Table(
            title=f"Peak memory: {task.size}",
            notes=(
                "Of torch's CPU allocator, as its profiler records it: exact, and the same in every run.",
                *left_out(),
            ),
            columns=("loop", "data loading", "MB", "ratio"),
            lines=tuple((arm.name, arm.data, f"{peak / 1e6:.3f}", f"{peak / base:.3f}") for arm, peak, _ in held),
            reach=tuple(Reach(f"{name}, peak memory", peaks[name] / base, LIMITS[task]) for name in goals),
            results=tuple({"arm": arm.name, "data": arm.data, "bytes": peak} for arm, peak, _ in held),
        )
    yield estimates.table(quick)
    yield vocabulary.table(1_000 if quick else 131_072, 64 if quick else 256)


def peak(arm: Arm, task: Task) -> tuple[int, nn.Module]:
    """Train, and give the largest number of bytes that were allocated at one time, and the model."""
    shared = (task.batches, task.held_out)  # what all arms use is not counted
    found = most_held(lambda: arm.train(task, Clock(task)))
    del shared
    return found
