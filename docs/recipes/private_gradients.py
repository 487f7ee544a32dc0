"""Differentially private updates: every sample's gradient is clipped by itself, and noise is added to the sum."""

import attrs
import toolz
import torch
from torch import nn

import forgather_fn as ff


def by_sample(program: ff.Program, max_norm: float) -> ff.Program:
    """Clip the gradient of each sample (Abadi et al., 2016), all of them in one vmapped pass."""

    def step(state, batch, *, wants=frozenset()):
        def loss(params, x, y):
            outputs = torch.func.functional_call(program.module(), params, (x[None],))
            return nn.functional.cross_entropy(outputs, y[None])

        x, y = batch.data
        each, losses = torch.func.vmap(torch.func.grad_and_value(loss), (None, 0, 0))(dict(state.params), x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
        share = (max_norm / (norms + 1e-6)).clamp(max=1.0) / len(x)
        mean = {name: torch.tensordot(share, g, dims=1) for name, g in each.items()}
        state, reports = program.update(state, mean, samples=len(x))
        return state, {**reports, "loss": losses.mean(), "clipped": (norms > max_norm).double().mean()}

    return attrs.evolve(program, step=step)


x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
data = ff.batches((x, (x.sum(1) > 0).long()), batch_size=64)
plan = ff.Plan(
    model=lambda: nn.Linear(8, 2),
    loss=ff.losses.cross_entropy,
    optimizer=ff.sgd(),
    schedule=0.5,
    transforms=[ff.noise(1.0 * 0.5 / 64)],  # noise multiplier times max_norm, over the batch size
)
program = by_sample(ff.single(plan), max_norm=0.5)
final = toolz.pipe(program.steps(program.init(seed=0), data), ff.until(steps=100), ff.last)
print(program.evaluate(final, data))
