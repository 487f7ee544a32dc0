"""The ``data`` row: a dataset that sleeps, and how much of its sleep a loop waits for."""

import time
from collections.abc import Iterator
from typing import Any, Final

import attrs
import torch
from torch.utils.data import DataLoader, RandomSampler

import forgather_fn as ff
from benchmarks import models
from benchmarks.arms import ALONE, BY_HAND, OURS
from benchmarks.loops import by_hand, by_library
from benchmarks.measure import NO_DATA, TOLERANCE, Arm, interleaved, ratio, spread
from benchmarks.table import Reach, Table
from benchmarks.task import Batch, Rows, Task

ROUNDS: Final = 9
SLEEP: Final = 0.01
"""Seconds that a sample takes, as one from a disk or a network does: waiting, not work. A batch "
"takes what a step does."""

TASK = Task(name="3.3 M parameters in 54 tensors", shape=models.LARGE, batch_size=4, warmup=4, steps=15)
LIMIT: Final = 1.1
"""With threads, against the same loop with batches made before, wall time."""

THREADS: Final = "in 2 threads"


class Sleeping(Rows):
    """Rows that are waited for."""

    def __getitem__(self, index: int) -> Batch:
        time.sleep(SLEEP)
        return super().__getitem__(index)


def loader(task: Task, workers: int) -> DataLoader[Batch]:
    """Make torch's loader."""
    rows = Sleeping(task.tokens)
    sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(0))
    return DataLoader(rows, batch_size=task.batch_size, sampler=sampler, num_workers=workers)


def streamed(task: Task, **given: Any) -> ff.Stream:
    """Make this library's stream, in the same order."""
    return ff.batches(Sleeping(task.tokens), batch_size=task.batch_size, order="torch", seed=0, **given)


ARMS: Final = (
    *ALONE,
    Arm(BY_HAND, "DataLoader, no workers", lambda task, clock: by_hand(task, clock, loader(task, 0))),
    Arm(BY_HAND, "DataLoader, 2 workers", lambda task, clock: by_hand(task, clock, loader(task, 2))),
    Arm(OURS, "in the step's thread", lambda task, clock: by_library(task, clock, streamed(task))),
    Arm(OURS, "in 1 thread", lambda task, clock: by_library(task, clock, streamed(task, threads=1))),
    Arm(OURS, THREADS, lambda task, clock: by_library(task, clock, streamed(task, threads=2))),
    Arm(OURS, "in 2 workers", lambda task, clock: by_library(task, clock, streamed(task, workers=2))),
)


def run(quick: bool) -> Iterator[Table]:
    """Measure all arms side by side."""
    rounds, task = (1, attrs.evolve(TASK, warmup=2, steps=3)) if quick else (ROUNDS, TASK)
    results = interleaved(task, ARMS, rounds)
    alone = next(result for result in results if result.arm.name == OURS and result.arm.data == NO_DATA)
    ahead = next(result for result in results if result.arm.data == THREADS)
    yield Table(
        title=f"A dataset that sleeps {SLEEP * 1000:g} ms a sample: {task.size}, {rounds} rounds of {task.steps} steps",
        notes=(
            "Ratios of wall time to the hand-written loop with batches made before, which waits for nothing.",
            f"Held-out losses are equal within {TOLERANCE}, relatively.",
        ),
        columns=("loop", "data loading", "wall ms a step", "CPU ms a step", "wall ratio"),
        lines=tuple(
            (
                result.arm.name,
                result.arm.data,
                spread(result.wall, 1e-3),
                spread(result.cpu, 1e-3),
                f"{ratio(result.wall, results[0].wall):.2f}",
            )
            for result in results
        ),
        reach=(Reach(f"{OURS}, {THREADS}, against no loading", ratio(ahead.wall, alone.wall), LIMIT),),
        results=tuple(result.as_json() for result in results),
    )
