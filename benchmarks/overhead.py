"""The ``overhead`` row: what a loop takes beside the model's own work, eager, on one CPU thread."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from benchmarks import models
from benchmarks.arms import ALONE, BY_HAND, CLASSES, LOADED, OURS, PEERS_ALONE, PEERS_LOADED, installed, left_out
from benchmarks.measure import NO_DATA, TOLERANCE, Result, interleaved, ratio, spread
from benchmarks.table import Reach, Table
from benchmarks.task import Task

ROUNDS: Final = 21
"""Many short rounds rather than few long ones: what else the machine does then falls on all arms alike."""

SMALL = Task(name="43 k parameters in 30 tensors", shape=models.SMALL, batch_size=4, warmup=10, steps=40)
DEEP = Task(name="150 k parameters in 150 tensors", shape=models.DEEP, batch_size=4, warmup=5, steps=15)
LARGE = Task(name="3.3 M parameters in 54 tensors", shape=models.LARGE, batch_size=4, warmup=4, steps=10)

LIMITS: Final = {SMALL: 0.88, LARGE: 0.98}
"""With data loading in this process, against the hand-written loop with torch's DataLoader, CPU time."""

CLASS_LIMIT: Final = 1.05
"""The same for the class layer, on the smallest model, which uses torch's DataLoader as well."""

NOTES: Final = (
    "Every arm: the same initial weights, batches and order; clipping, AdamW (fused, no decay for biases and norms), a",
    "schedule by step; loss, gradient norm and learning rate kept every 10 steps (the Lightning Trainer: the loss).",
    "Off in all of them: loggers, progress bars, checkpoints, model summaries. The ratio is of medians.",
)


def run(quick: bool) -> Iterator[Table]:
    """Measure each model; quick: the smallest, a few steps of it."""
    arms = (*LOADED, *installed(PEERS_LOADED), *ALONE, *installed(PEERS_ALONE))
    for task in (SMALL,) if quick else (SMALL, DEEP, LARGE):
        rounds, timed = (1, attrs.evolve(task, warmup=2, steps=3)) if quick else (ROUNDS, task)
        results = interleaved(timed, arms, rounds)
        loaded = [result for result in results if result.arm.data != NO_DATA]
        alone = [result for result in results if result.arm.data == NO_DATA]
        size = f"{task.size}, {rounds} rounds of {timed.steps} steps"
        yield _table(f"Steps with data loading: {size}", loaded, _reach(task, loaded))
        yield _table(f"The step alone: {size}", alone, ())


def _reach(task: Task, results: Sequence[Result]) -> tuple[Reach, ...]:
    if task not in LIMITS:
        return ()
    columns = next(r for r in results if r.arm.name == OURS)
    found = [Reach(f"{OURS}, data loading in process", ratio(columns.cpu, results[0].cpu), LIMITS[task])]
    if task is SMALL:
        classes = next(r for r in results if r.arm.name == CLASSES)
        found.append(Reach(CLASSES, ratio(classes.cpu, results[0].cpu), CLASS_LIMIT))
    return tuple(found)


def _table(title: str, results: Sequence[Result], reach: tuple[Reach, ...]) -> Table:
    base = results[0]
    assert base.arm.name == BY_HAND
    return Table(
        title=title,
        notes=(*NOTES, *left_out(), f"Held-out losses are equal within {TOLERANCE}, relatively."),
        columns=("loop", "data loading", "CPU ms a step", "wall ms a step", "CPU ratio", "wall ratio", "loss"),
        lines=tuple(
            (
                result.arm.name,
                result.arm.data,
                spread(result.cpu, 1e-3),
                spread(result.wall, 1e-3),
                f"{ratio(result.cpu, base.cpu):.2f}",
                f"{ratio(result.wall, base.wall):.2f}",
                f"{statistics.median(result.losses):.6f}",
            )
            for result in results
        ),
        reach=reach,
        results=tuple(result.as_json() for result in results),
    )
