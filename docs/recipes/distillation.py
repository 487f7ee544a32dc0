"""Distil a large model into a small one: the frozen teacher is a part of the loss, and of no state or checkpoint."""

import attrs
import toolz
import torch
from torch import nn

import forgather_fn as ff


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 8))


x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
labels = (x @ torch.randn(16, 8, generator=torch.Generator().manual_seed(1))).relu().argmax(1)
few, many = (ff.batches((x[:size], labels[:size]), batch_size=64) for size in (256, 3072))
held_out = ff.batches((x[3072:], labels[3072:]), batch_size=256)


def trained(plan: ff.Plan, data: ff.Stream) -> tuple[ff.Program, ff.TrainState]:
    program = ff.single(plan)
    return program, toolz.pipe(program.steps(program.init(seed=0), data), ff.until(steps=300), ff.last)


plan = ff.Plan(model=lambda: network(256), loss=ff.losses.cross_entropy, optimizer=ff.adamw(), schedule=3e-3)
program, state = trained(plan, many)
teacher = program.export(state)

small = attrs.evolve(plan, model=lambda: network(16))
learning = attrs.evolve(small, loss=ff.losses.distilled(plan.loss, teacher=teacher, temperature=2.0, share=0.9))
for name, student in {"alone": small, "with a teacher": learning}.items():
    program, state = trained(student, few)
    measured = program.evaluate(state, held_out, metrics=[ff.metrics.accuracy])
    print(f"{name}: accuracy {measured['accuracy']:.3f}")
