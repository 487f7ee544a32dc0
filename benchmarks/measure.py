"""Measuring side by side: arms take turns in one process, and must end at the same loss."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import attrs
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.task import Task

T = TypeVar("T")

TOLERANCE: Final = 1e-5
"""How far held-out losses may lie apart, relatively. Rounding gives 1e-7 here, no clipping, no weight decay, or a
schedule that is one step late 1e-4 and more."""


@attrs.define
class Clock:
    """A learning-rate schedule that times the steps between two of its calls.

    The schedule is the one function of the user's that every loop calls exactly once a step, so each arm is timed
    between the same two points of its own loop, whatever it does before and after.

    Attributes:
        task: Which steps are timed.
        wall: Seconds a step, when the run is over.
        cpu: Seconds of CPU time a step, of all threads.
    """

    task: Task
    wall: float = math.nan
    cpu: float = math.nan
    _begun: tuple[float, float] = (math.nan, math.nan)

    def __call__(self, step: int) -> float:
        """Give the factor on the peak learning rate: a rise over 5 steps, then a fall."""
        if step == self.task.warmup:
            gc.collect()
            self._begun = time.perf_counter(), time.process_time()
        elif step == self.task.warmup + self.task.steps:
            self.wall = (time.perf_counter() - self._begun[0]) / self.task.steps
            self.cpu = (time.process_time() - self._begun[1]) / self.task.steps
        return min((step + 1) / 5, 1 - 0.8 * step / self.task.updates)


Train = Callable[[Task, Clock], nn.Module]


@attrs.frozen
class Arm:
    """One way to do a task.

    Attributes:
        name: Whose loop.
        data: How it gets its batches; ``NO_DATA`` where they are made beforehand, so that getting them takes no time.
        train: Do the task, with the clock as its schedule, and give the trained model.
    """

    name: str
    data: str
    train: Train


NO_DATA: Final = "no: batches made before"


@attrs.frozen
class Result:
    """What one arm took: seconds a step in each round, and the held-out loss of its model after each."""

    arm: Arm
    wall: list[float] = attrs.field(factory=list)
    cpu: list[float] = attrs.field(factory=list)
    losses: list[float] = attrs.field(factory=list)

    def as_json(self) -> dict[str, Any]:
        """Give it for writing."""
        return {"arm": self.arm.name, "data": self.arm.data, "wall": self.wall, "cpu": self.cpu, "losses": self.losses}


def interleaved(task: Task, arms: Sequence[Arm], rounds: int) -> list[Result]:
    """Let the arms take turns, each round in another order, and read their clocks.

    A round of an arm is a whole run, from the initial weights. The garbage collector runs as each library has it, and
    is emptied when the clock starts.

    Raises:
        ValueError: An arm ended at another loss than the first, or its schedule was not called at every step.
    """
    results = [Result(arm) for arm in arms]
    for turn in range(rounds):
        for result in [*results[turn % len(arms) :], *results[: turn % len(arms)]]:
            clock = Clock(task)
            model = result.arm.train(task, clock)
            if math.isnan(clock.wall):
                raise ValueError(f"{result.arm.name}: the schedule was not called at every step, so nothing was timed")
            result.wall.append(clock.wall)
            result.cpu.append(clock.cpu)
            result.losses.append(task.loss(model))
    check_losses((result.arm, loss) for result in results for loss in result.losses)
    return results


def check_losses(ended: Iterable[tuple[Arm, float]]) -> None:
    """Make sure that all arms did the same.

    Raises:
        ValueError: An arm ended at another loss than the first.
    """
    (first, expected), *others = ended
    for arm, loss in others:
        if not math.isclose(loss, expected, rel_tol=TOLERANCE):
            raise ValueError(
                f"{arm.name} (data loading: {arm.data}) ended at the loss {loss!r}, {first.name} at {expected!r}, "
                f"which is not equal within {TOLERANCE}: they did not do the same, so what they took says nothing"
            )


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Divide the medians of interleaved times."""
    return statistics.median(times) / statistics.median(base)


def spread(times: Sequence[float], unit: float) -> str:
    """Write the median and, in brackets, the range."""
    low, middle, high = (value / unit for value in (min(times), statistics.median(times), max(times)))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def most_held(run: Callable[[], T]) -> tuple[int, T]:
    """Run a function, and give the largest number of bytes that were allocated at one time, and its result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = enumerate(recorded.profiler.kineto_results.events())
    changes = sorted((event.start_ns(), i, event.nbytes()) for i, event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, _, change in changes)), result
