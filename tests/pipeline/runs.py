"""Runs over several processes and on one, to be compared."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

import forgather_fn as ff
from forgather_fn.gradient import Spread
from tests.pipeline.models import MODELS, Model, words

STEPS = 6


def plan_of(chosen: Model, /, **changes: Any) -> ff.Plan:
    """A plan with all that could go wrong: clipping that is active, warm-up, decay, unequal numbers of tokens."""
    given: dict[str, Any] = {
        "model": chosen.module(),
        "loss": chosen.loss,
        # With a smaller eps, Adam makes steps of full size of gradients that cancel to rounding errors.
        "optimizer": ff.adamw(weight_decay=0.1, eps=1e-6),
        "schedule": ff.schedules.cosine(peak=1e-2, warmup=2, total=12),
        "transforms": (ff.clipped(0.5),),
        "microbatches": 4,
    }
    return ff.Plan(**given | changes)


@attrs.frozen
class Found:
    """What a run has come to, on one process."""

    params: Mapping[str, Tensor]
    metrics: list[dict[str, float]]
    evaluated: dict[str, float]


def batches(steps: int, start: int = 0) -> list[dict[str, Tensor]]:
    """Batches whose length varies."""
    return [words(time=(6, 9, 6, 5)[i % 4], seed=i) for i in range(start, start + steps)]


def run(program: ff.Program, steps: int = STEPS, state: ff.TrainState | None = None) -> Found:
    state = program.init(seed=3) if state is None else state
    metrics = []
    for batch in batches(steps, start=state.step):
        state, told = program.step(state, batch)
        metrics.append({name: float(value) for name, value in told.items()})
    evaluated = program.evaluate(state, [words(samples=3, seed=50), words(samples=5, time=8, seed=51), words(seed=52)])
    return Found({name: p.detach().clone() for name, p in state.params.items()}, metrics, evaluated)


def measured_in_float64(gradients: ff.Gradients, state: Any, **_: Any) -> tuple[ff.Gradients, Any]:
    """Measure on one device as a pipeline does, so that what remains is the order of sums of gradients."""
    return attrs.evolve(gradients, spread=Spread(lambda numbers: numbers, shards=False)), state


def single(name: str, changes: Mapping[str, Any]) -> Found:
    wide = ff.Transform(lambda params: None, measured_in_float64, defers=True)
    plan = plan_of(MODELS[name], **changes)
    return run(ff.single(attrs.evolve(plan, transforms=(wide, *plan.transforms))))


def pipelined(name: str, schedule: str, stages: int, changes: Mapping[str, Any], **options: Any) -> Found:
    model = MODELS[name]
    return run(ff.pipelined(plan_of(model, **changes), model.spec(stages), schedule=schedule, **options))
