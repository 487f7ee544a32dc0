"""Branch a run: save at step k, and go on from there in two ways that see the same data in the same order."""

import attrs
import toolz
import torch
from torch import nn

import forgather_fn as ff

x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
data = ff.batches((x, (x.prod(1) > 0).long()), batch_size=32)
plan = ff.Plan(
    model=lambda: nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2)),
    loss=ff.losses.cross_entropy,
    optimizer=ff.adamw(),
    schedule=3e-3,
)
program = ff.single(plan)
trunk = toolz.pipe(
    program.steps(program.init(seed=0), data), ff.until(steps=100), ff.every(100, ff.saved("trunk")), ff.last
)

for name, schedule in {"constant": 3e-3, "decay": ff.schedules.linear(peak=6e-3, total=200)}.items():
    branch = ff.single(attrs.evolve(plan, schedule=schedule))
    state = branch.restore("trunk", allow={"schedule"})  # what differs on purpose is named
    assert (state.step, state.samples) == (100, 3200)
    final = toolz.pipe(branch.steps(state, data), ff.until(steps=200), ff.every(200, ff.saved(name)), ff.last)
    print(f"{name}: loss {branch.evaluate(final, data)['loss']:.4f}")

unbroken = toolz.pipe(program.steps(program.init(seed=0), data), ff.until(steps=200), ff.last)
assert ff.difference(unbroken, program.restore("constant")) is None  # to the bit
