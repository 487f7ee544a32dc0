"""A learning-rate range test: raise the rate exponentially in one short run, and read off where the loss explodes."""

import toolz
import torch
from torch import nn

import forgather_fn as ff

LEAST, MOST, STEPS = 1e-4, 30.0, 120

x = torch.randn(1024, 16, generator=torch.Generator().manual_seed(0))
data = ff.batches((x, x[:, :4].argmax(1)), batch_size=64)
plan = ff.Plan(
    model=lambda: nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)),
    loss=ff.losses.cross_entropy,
    optimizer=ff.sgd(momentum=0.9),
    schedule=lambda step: LEAST * (MOST / LEAST) ** (step / STEPS),
)
rows: list[tuple[float, float]] = []


def note(tick: ff.Tick) -> None:
    smooth = rows[-1][1] if rows else float(tick.metrics["loss"])
    rows.append((tick.metrics["learning_rate"], 0.9 * smooth + 0.1 * float(tick.metrics["loss"])))


program = ff.single(plan)
toolz.pipe(
    program.steps(program.init(seed=0), data),
    ff.every(1, note),
    ff.stopped_by(lambda tick: rows[-1][1] > 2 * min(loss for _, loss in rows)),
    ff.until(steps=STEPS),
    ff.last,
)
lowest = min(rows, key=lambda row: row[1])[0]
print(f"the loss is lowest at {lowest:.2g} and explodes at {rows[-1][0]:.2g}: take about {lowest / 5:.1g}")
