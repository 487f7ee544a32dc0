"""What ``forgather_fn.memory`` says before a training, and what the training takes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
from torch import nn

import forgather_fn as ff
from benchmarks import models
from benchmarks.loops import plan_of
from benchmarks.measure import Clock, most_held
from benchmarks.overhead import DEEP, LARGE, SMALL
from benchmarks.table import Reach, Table
from benchmarks.task import Batch, Task
from forgather_fn.activation_checkpointing import activation_checkpointed

WITHIN: Final = 0.1
"""How far an estimate may be from what is measured, relatively."""

LLAMA: Final = attrs.evolve(LARGE, name="Llama of that width and depth", build=models.llama)


def table(quick: bool) -> Table:
    """Compare them for each model and for plans that take more or less; quick: the smallest model."""
    found = []
    for task in (SMALL,) if quick else (SMALL, DEEP, LARGE, LLAMA):
        for name, fields in PLANS.items():
            plan = functools.partial(plan_of, task, functools.partial(Clock, task), **fields(task))
            batch = task.batches[0]
            taken, _ = most_held(functools.partial(_two_steps, plan, batch))
            expected = ff.memory(plan(), batch)
            found.append((task.name, name, taken, expected.peak - expected.batch))  # the batch is there before
    worst = max(abs(estimate / taken - 1) for _, _, taken, estimate in found)
    return Table(
        title="Peak memory, measured, and estimated before training",
        columns=("model", "plan", "measured, MB", "estimated, MB", "ratio"),
        lines=tuple(
            (model, plan, f"{taken / 1e6:.3f}", f"{estimate / 1e6:.3f}", f"{estimate / taken:.3f}")
            for model, plan, taken, estimate in found
        ),
        reach=(Reach("the largest relative error of an estimate", worst, WITHIN),),
        results=tuple(dict(zip(("model", "plan", "measured", "estimated"), row, strict=True)) for row in found),
    )


def _two_steps(plan: Callable[[], ff.Plan], batch: Batch) -> None:
    """Take a step, and one that finds the memory of the first."""
    program = ff.single(plan())
    ff.fold(program.step, program.init(0), [batch] * 2)


def _recomputed(task: Task) -> nn.Module:
    model = task.model()
    blocks = [f"{name}.*" for name, child in model.named_modules() if isinstance(child, nn.ModuleList)]
    return activation_checkpointed(model, *blocks)


PLANS: Final[Mapping[str, Callable[[Task], Mapping[str, Any]]]] = {
    "as it is": lambda task: {},
    "microbatches=4": lambda task: {"microbatches": 4},
    'precision="bfloat16"': lambda task: {"precision": "bfloat16"},
    "viewed_elements=0": lambda task: {"viewed_elements": 0},
    'update="in_backward"': lambda task: {"update": "in_backward", "transforms": ()},
    "average=ema(0.999)": lambda task: {"average": ff.ema(0.999)},
    "activation_checkpointed blocks": lambda task: {"model": functools.partial(_recomputed, task)},
}
