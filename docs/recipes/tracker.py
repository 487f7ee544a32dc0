"""A loop of your own, with logging to any tracker: no stages, no callbacks, a `for` over steps."""

import json
from pathlib import Path

import torch
from torch import nn

import forgather_fn as ff


def log(numbers: dict[str, float], step: int) -> None:
    """Stand for the tracker of your choice."""
    with Path("log.jsonl").open("a") as file:
        print(json.dumps({"step": step, **numbers}), file=file)


x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
train, held_out = (ff.batches((part, part.sum(1, keepdim=True)), batch_size=32) for part in (x[:448], x[448:]))
plan = ff.Plan(model=lambda: nn.Linear(8, 1), loss=ff.losses.mse, optimizer=ff.adamw(), schedule=0.05)
program = ff.single(plan)

for tick in program.steps(program.init(seed=0), train):
    step = tick.state.step
    if step % 10 == 0:  # metrics are still on the device, and reading them waits for it: do so now and then
        log({name: float(value) for name, value in tick.metrics.items()}, step)
    if step % 50 == 0:
        log({f"eval_{name}": value for name, value in program.evaluate(tick.state, held_out).items()}, step)
    if step == 100:
        break

print(Path("log.jsonl").read_text().splitlines()[-1])
