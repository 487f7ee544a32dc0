"""The ``scaling`` row: whether the overhead of a step stays flat, from 1 to 64 microbatches, and from 1 to 96 layers;
and what a step takes on several processes.

A step's time is linear in what it is made of. So the time of the largest is compared with the straight line through two
small ones: what grows faster than the work would show.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import attrs
import torch

import forgather_fn as ff
from benchmarks import models, worlds
from benchmarks.measure import spread
from benchmarks.table import Reach, Table

ROUNDS: Final = 9
MICROBATCHES: Final = (1, 8, 16, 64)
LAYERS: Final = (1, 12, 24, 96)
SHAPE = models.Shape(vocabulary=64, width=16, layers=2, heads=2, context=8)
LIMIT: Final = 1.1


def run(quick: bool) -> Iterator[Table]:
    """Measure all; quick: the small ones."""
    rounds = 1 if quick else ROUNDS
    counts, depths = (MICROBATCHES[:2], LAYERS[:2]) if quick else (MICROBATCHES, LAYERS)
    yield _table("microbatches", rounds, {count: _step(SHAPE, count, 2 * count) for count in counts})
    shapes = {depth: attrs.evolve(SHAPE, layers=depth) for depth in depths}
    yield _table("layers", rounds, {depth: _step(shape, 1, 4) for depth, shape in shapes.items()})
    yield from worlds.run(quick)


def _step(shape: models.Shape, microbatches: int, samples: int) -> Callable[[], None]:
    plan = ff.Plan(
        model=lambda: models.built(shape),
        loss=ff.losses.causal_lm,
        optimizer=ff.adamw(),
        schedule=1e-3,
        transforms=(ff.clipped(1.0),),
        microbatches=microbatches,
    )
    program = ff.single(plan)
    held = [program.init(0)]
    tokens = torch.arange(samples * shape.context).reshape(samples, shape.context) % shape.vocabulary
    batch = {"input_ids": tokens, "labels": tokens}

    def step() -> None:
        held[0], _ = program.step(held[0], batch)

    return step


def _table(what: str, rounds: int, steps: Mapping[int, Callable[[], None]]) -> Table:
    times: dict[int, list[float]] = {count: [] for count in steps}
    for turn in range(rounds + 1):
        for count, step in steps.items():
            gc.collect()
            began = time.process_time()
            for _ in range(5):
                step()
            if turn:  # the first one warms up
                times[count].append((time.process_time() - began) / 5)
    middle = {count: statistics.median(found) for count, found in times.items()}
    one, few, most = min(steps), sorted(steps)[1], max(steps)
    line = middle[one] + (middle[few] - middle[one]) / (few - one) * (most - one)
    lines = [(str(n), spread(found, 1e-3), f"{middle[n] / n * 1e3:.3f}") for n, found in times.items()]
    return Table(
        title=f"From {one} to {most} {what}, {rounds} rounds",
        columns=(what, "CPU ms a step", f"CPU ms for each of the {what}"),
        lines=tuple(lines),
        reach=(Reach(f"{most} {what}, against the line through {one} and {few}", middle[most] / line, LIMIT),),
        results=tuple({what: count, "cpu": found} for count, found in times.items()),
    )
