"""Differentially private updates: every sample's gradient is clipped by itself, and noise is added to the sum."""

import attrs
import toolz
import torch
from torch import nn

import forgather_fn as ff

MAX_NORM, NOISE, SAMPLES = 0.5, 1.0, 64


def by_sample(program: ff.Program) -> ff.Program:
    """Clip the gradient of each sample (Abadi et al., 2016), all of them in one vmapped pass."""

    def step(state, batch, *, wants=frozenset()):
        def loss(params, x, y):
            outputs = torch.func.functional_call(program.module(), params, (x[None],))
            return nn.functional.cross_entropy(outputs, y[None])

        x, y = batch.data
        each, losses = torch.func.vmap(torch.func.grad_and_value(loss), (None, 0, 0))(dict(state.params), x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
        share = (MAX_NORM / (norms + 1e-6)).clamp(max=1.0) / len(x)
        mean = {name: torch.tensordot(share, g, dims=1) for name, g in each.items()}
        state, reports = program.update(state, mean, batch=batch)
        return state, {**reports, "loss": losses.mean()}

    return attrs.evolve(program, step=step)


x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
data = ff.batches((x, (x.sum(1) > 0).long()), batch_size=SAMPLES)
noise = ff.noise(NOISE * MAX_NORM / SAMPLES)
model, loss = (lambda: nn.Linear(8, 2)), ff.losses.cross_entropy
plan = ff.Plan(model=model, loss=loss, optimizer=ff.sgd(), schedule=0.5, transforms=[noise])
program = by_sample(ff.single(plan))
final = toolz.pipe(program.steps(program.init(seed=0), data), ff.until(steps=100), ff.last)
print(program.evaluate(final, data))
