"""Measuring side by side: arms take turns in one process, and must end at the same loss."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs
import torch
from torch import nn

from benchmarks.task import Task

ROUNDS: Final = 9
TOLERANCE: Final = 1e-4
"""Relative difference of held-out losses that rounding may make. Every step left out, or made otherwise, makes more."""


@attrs.define
class Clock:
    """A learning-rate schedule that times the steps between two of its calls.

    The schedule is the one function of the user's that every loop calls exactly once a step, so each arm is timed between
    the same two points of its own loop, whatever it does before and after.

    Attributes:
        task: Which steps are timed.
        wall: Seconds a step, when the run is over.
        cpu: Seconds a step of CPU time, of all threads.
    """

    task: Task
    wall: float = math.nan
    cpu: float = math.nan
    _begun: tuple[float, float] = (math.nan, math.nan)

    def __call__(self, step: int) -> float:
        """Give the factor on the peak learning rate: a rise over 20 steps, then a fall."""
        if step == self.task.warmup:
            gc.collect()
            self._begun = time.perf_counter(), time.process_time()
        elif step == self.task.warmup + self.task.steps:
            now = time.perf_counter(), time.process_time()
            self.wall, self.cpu = (
                (stop - start) / self.task.steps for start, stop in zip(self._begun, now, strict=True)
            )
        return min((step + 1) / 20, 1 - 0.8 * step / self.task.updates)


Train = Callable[[Task, Clock], nn.Module]


@attrs.frozen
class Arm:
    """One way to do a task.

    Attributes:
        name: Whose loop.
        data: How it gets its batches, and so whether that is in its time.
        train: Run the task, the clock as its schedule, and give the trained model.
    """

    name: str
    data: str
    train: Train


@attrs.frozen
class Result:
    """What one arm took: seconds a step in each round, and the loss at which it ended."""

    arm: Arm
    wall: list[float]
    cpu: list[float]
    loss: float

    def as_json(self) -> dict[str, Any]:
        """Give it for writing."""
        return {"arm": self.arm.name, "data": self.arm.data, "wall": self.wall, "cpu": self.cpu, "loss": self.loss}


def interleaved(task: Task, arms: Sequence[Arm], rounds: int) -> list[Result]:
    """Let the arms take turns, each round in another order, and read their clocks.

    A round of an arm is a whole run, from the initial weights. The garbage collector is on, as each library has it, and
    is emptied when the clock starts.

    Raises:
        ValueError: An arm ended at another loss than the first, or never passed its clock.
    """
    results = [Result(arm, [], [], math.nan) for arm in arms]
    for turn in range(rounds):
        for i in [*range(turn % len(arms), len(arms)), *range(turn % len(arms))]:
            clock = Clock(task)
            model = arms[i].train(task, clock)
            loss = task.loss(model)
            del model
            gc.collect()
            if math.isnan(clock.wall):
                raise ValueError(f"{arms[i].name}: the schedule was not called at every step")
            results[i].wall.append(clock.wall)
            results[i].cpu.append(clock.cpu)
            results[i] = attrs.evolve(results[i], loss=loss)
    for result in results[1:]:
        if not math.isclose(result.loss, results[0].loss, rel_tol=TOLERANCE):
            raise ValueError(
                f"{result.arm.name} ({result.arm.data}) ended at the loss {result.loss!r}, {results[0].arm.name} at "
                f"{results[0].loss!r}: they did not do the same, so their times say nothing"
            )
    return results


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Divide the medians of interleaved times."""
    return statistics.median(times) / statistics.median(base)


def pin_threads() -> None:
    """Use one thread, so that what is measured is work and not its distribution."""
    torch.set_num_threads(1)
