"""Halve the microbatch when memory runs out: a step that fails has consumed nothing, so it is simply taken again."""

import attrs
import torch
from torch import nn

import forgather_fn as ff


def shrinking(plan: ff.Plan) -> ff.Program:
    """Take a step that runs out of memory again, in twice as many microbatches: the same gradient in less memory."""
    program = ff.single(plan)

    def step(state, batch, *, wants=frozenset()):
        nonlocal program
        try:
            return program.step(state, batch, wants=wants)
        except torch.OutOfMemoryError:
            count = 2 * program.plan.microbatches
            print(f"step {state.step}: out of memory, now {count} microbatches")
            smaller = ff.single(attrs.evolve(program.plan, microbatches=count))  # refused where samples are too few
            state, program = program.convert(state, smaller), smaller
            return step(state, batch, wants=wants)

    return attrs.evolve(program, step=step)


class Hungry(nn.Linear):
    """Stand for a model for which 8 samples at once are all that fits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 8:
            raise torch.OutOfMemoryError
        return super().forward(x)


x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
data = ff.batches((x, x.sum(1, keepdim=True)), batch_size=32)
program = shrinking(ff.Plan(model=lambda: Hungry(4, 1), loss=ff.losses.mse, optimizer=ff.sgd(), schedule=0.1))
ff.last(ff.until(steps=50)(program.steps(program.init(), data)))
