"""Differentially private updates: every sample's gradient is clipped by itself, and noise is added to the sum."""

import attrs
import toolz
import torch
from torch import nn

import forgather_fn as ff


def privately(program: ff.Program, max_norm: float, multiplier: float) -> ff.Program:
    """Clip by sample and add noise of ``multiplier * max_norm`` (Abadi et al., 2016), by one vmapped gradient."""

    def step(state, batch, *, wants=frozenset()):
        module, (x, y) = program.module(), batch.data

        def loss(params, one, label):
            outputs = torch.func.functional_call(module, params, (one[None],))
            return nn.functional.cross_entropy(outputs, label[None])

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(dict(state.params), x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
        share = (max_norm / (norms + 1e-6)).clamp(max=1.0) / len(x)
        sums = {name: torch.tensordot(share, g, dims=1) for name, g in each.items()}
        gradients, buffers, metrics = program.gradients(state, batch)
        state, reports = program.update(state, gradients.replaced(sums, by="clipping by sample"), buffers)
        return state, {**metrics, **reports, "clipped": (norms > max_norm).float().mean()}

    noisy = attrs.evolve(program.plan, transforms=(ff.noise(multiplier * max_norm / 64), *program.plan.transforms))
    program = ff.single(noisy)
    return attrs.evolve(program, step=step)


x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
data = ff.batches((x, (x.sum(1) > 0).long()), batch_size=64)
plan = ff.Plan(model=lambda: nn.Linear(8, 2), loss=ff.losses.cross_entropy, optimizer=ff.sgd(), schedule=0.5)
program = privately(ff.single(plan), max_norm=0.5, multiplier=1.0)
final = toolz.pipe(program.steps(program.init(seed=0), data), ff.until(steps=100), ff.last)
print(program.evaluate(final, data))
