"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby (Foret et al., 2021)."""

import attrs
import toolz
import torch
from torch import nn

import forgather_fn as ff


def sharpness_aware(program: ff.Program, radius: float) -> ff.Program:
    """Make steps of two passes: up the gradient by ``radius``, and from there back."""

    def step(state, batch, *, wants=frozenset()):
        gradients, _, _ = program.gradients(state, batch)
        scale = radius / (gradients.norm() + 1e-12)
        worst = state.copy()
        for name, gradient in gradients.items():
            worst.params[name].add_(scale * gradient)
        gradients, buffers, metrics = program.gradients(worst, batch)
        state, reports = program.update(state, gradients, buffers)
        return state, {**metrics, **reports}

    return attrs.evolve(program, step=step)


x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
data = ff.batches((x, (x.prod(1) > 0).long()), batch_size=32)
plan = ff.Plan(
    model=lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)),
    loss=ff.losses.cross_entropy,
    optimizer=ff.sgd(momentum=0.9),
    schedule=0.1,
)
for program in (ff.single(plan), sharpness_aware(ff.single(plan), radius=0.05)):
    final = toolz.pipe(program.steps(program.init(seed=0), data), ff.until(steps=100), ff.last)
    print(f"loss {program.evaluate(final, data)['loss']:.3f}")
