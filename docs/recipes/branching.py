"""Branch a run: save at step k, and go on from there in several ways that see the same data in the same order."""

import attrs
import toolz
import torch
from torch import nn

import forgather_fn as ff

x = torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
data = ff.batches((x, x[:, :4].argmax(1)), batch_size=32)
plan = ff.Plan(
    model=lambda: nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4)),
    loss=ff.losses.cross_entropy,
    optimizer=ff.adamw(),
    schedule=0.02,
)
program = ff.single(plan)
toolz.pipe(program.steps(program.init(seed=0), data), ff.every(100, ff.saved("trunk")), ff.until(steps=100), ff.last)

falling = ff.schedules.along(ff.schedules.straight, start=0.02, stop=0.0, steps=100)
ends = {"constant": 0.02, "falling": ff.schedules.joined(0.02, falling, boundaries=[100])}
for name, schedule in ends.items():
    branch = ff.single(attrs.evolve(plan, schedule=schedule))
    state = branch.restore("trunk", allow={"schedule"})  # what differs on purpose is named
    ticks = branch.steps(state, data)
    final = toolz.pipe(ticks, ff.every(200, ff.saved(name)), ff.until(steps=200), ff.last)
    print(f"{name}: loss {branch.evaluate(final, data)['loss']:.4f}")

unbroken = toolz.pipe(program.steps(program.init(seed=0), data), ff.until(steps=200), ff.last)
assert ff.difference(unbroken, program.restore("constant")) is None  # to the bit
