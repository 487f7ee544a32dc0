"""The ``pipeline`` rows: where the time of a step goes, on two processes, and the bubble, thought and measured."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

import forgather_fn as ff
from benchmarks.table import Reach, Table
from forgather_fn.pipeline.schedules import KINDS, arrange, orders
from forgather_fn.pipeline.simulation import simulate
from forgather_fn.testing.processes import processes

RANKS: Final = 2
MICROBATCHES: Final = 8
STEPS: Final = 15
LIMIT: Final = 0.03
"""Of a step of 100 ms, which is this library's own."""

STEP: Final = 0.1


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.change(hidden)


class Model(nn.Module):
    """Eight equal blocks, of which a step takes about 100 ms on two processes of one thread."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.layer = nn.ModuleList(Block(width) for _ in range(8))
        self.head = nn.Linear(width, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layer:
            hidden = layer(hidden)
        return self.head(hidden)


@attrs.define
class Clock:
    """Seconds in each part of a step; a part inside another counts in both."""

    parts: dict[str, float] = attrs.field(factory=dict)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - began

        return run


def watch(clock: Clock) -> None:
    """Time the model, the schedule's own run, its backward passes, what crosses processes, and the update."""
    from torch import distributed
    from torch.distributed.pipelining import PipelineStage

    from forgather_fn.pipeline import machine, running

    machine.Machine.run = clock.timed("model", machine.Machine.run)
    running._Passes.work = clock.timed("work", running._Passes.work)
    running._Passes._loss = clock.timed("model", running._Passes._loss)
    running.advance = clock.timed("advance", _noting(clock, running.advance))
    distributed.all_reduce = clock.timed("collectives", distributed.all_reduce)
    distributed.all_gather = clock.timed("collectives", distributed.all_gather)
    distributed.all_gather_single = clock.timed("collectives", distributed.all_gather_single)
    for name in ("backward_one_chunk", "backward_weight_one_chunk"):
        setattr(PipelineStage, name, clock.timed("backward", getattr(PipelineStage, name)))
    made = machine.scheduled
    machine.scheduled = lambda *args: clock.timed("schedule", made(*args))


def _noting(clock: Clock, advance: Callable[..., Any]) -> Callable[..., Any]:
    """Note how much of the collectives is inside of the update: the norm's."""

    def run(*args: Any) -> Any:
        before = clock.parts.get("collectives", 0.0)
        result = advance(*args)
        clock.parts["within"] = clock.parts.get("collectives", 0.0) - before
        return result

    return run


def measure(name: str, width: int, steps: int) -> list[dict[str, float]]:
    """Take steps on one process of the pipeline, and give the parts of each."""
    torch.manual_seed(0)
    held = KINDS[name.lower()].stages or 2
    spec = {f"layer.{i * 8 // (RANKS * held) - 1}": "end" for i in range(1, RANKS * held)}
    plan = ff.Plan(
        model=Model(width),
        loss=ff.losses.cross_entropy,
        optimizer=ff.adamw(),
        schedule=1e-3,
        transforms=(ff.clipped(1.0),),
        microbatches=MICROBATCHES,
    )
    program = ff.pipelined(plan, spec, schedule=name)
    ids = torch.randint(0, 64, (2 * MICROBATCHES, 32))
    batch = {"input_ids": ids, "labels": ids}
    state = program.init()
    state, _ = program.step(state, batch)
    clock = Clock()
    watch(clock)
    program = ff.pipelined(attrs.evolve(plan, model=Model(width)), spec, schedule=name)
    state = program.init()
    for _ in range(3):
        state, _ = program.step(state, batch)
    found = []
    for _ in range(steps):
        clock.parts.clear()
        began = time.perf_counter()
        state, _ = program.step(state, batch)
        found.append({"step": time.perf_counter() - began, **clock.parts})
    return found


def run(quick: bool) -> Iterator[Table]:
    """Run each schedule on two processes that compute with one thread each."""
    width, steps = (32, 2) if quick else (192, STEPS)
    lines, results, worst = [], [], 0.0
    for kind in KINDS.values():
        with processes(RANKS, timeout=300) as pool:
            told = pool.run(measure, kind.name, width, steps)
        parts = {name: _median(told, name) for name in told[0][0]}
        own = _own(told)
        worst = max(worst, own / STEP)
        held = kind.stages or 2
        arrangement = arrange(kind.name, ranks=RANKS, stages=RANKS * held, microbatches=MICROBATCHES)
        thought = simulate(orders(arrangement), RANKS * held).bubble
        waited = 1 - (parts["work"] + parts["backward"]) / parts["schedule"]
        cells = [f"{parts[name] * 1e3:.1f}" for name in ("step", "schedule", "work", "backward", "advance")]
        lines.append((kind.name, *cells, f"{own * 1e3:.2f}", f"{thought:.1%}", f"{waited:.1%}"))
        results.append({"schedule": kind.name, "parts": parts, "own": own, "bubble": (thought, waited)})
    yield Table(
        title=f"Pipeline: {RANKS} processes, {MICROBATCHES} microbatches, {steps} steps",
        notes=(
            "Milliseconds, medians over steps, of the slower process. *own* is what is neither the model, nor torch's "
            "schedule, nor a collective, nor the update. The bubble is thought (`explain`), and measured: the share of "
            "the schedule's run in which a process neither runs a stage forward nor backward.",
        ),
        columns=("schedule", "step", "schedule's run", "forward", "backward", "update", "own", "bubble", "measured"),
        lines=tuple(lines),
        reach=(Reach("own part of a step of 100 ms", worst, LIMIT),),
        results=tuple(results),
    )


def _median(told: list[list[dict[str, float]]], name: str) -> float:
    return max(statistics.median(step.get(name, 0.0) for step in steps) for steps in told)


def _own(told: list[list[dict[str, float]]]) -> float:
    """Find what is the library's: outside the schedule and the update, and around the model inside of it."""
    return max(statistics.median(map(_around, steps)) for steps in told)


def _around(step: dict[str, float]) -> float:
    sent = step["collectives"] - step["within"]
    return step["step"] - step["schedule"] - step["advance"] - sent + step["work"] - step["model"]
