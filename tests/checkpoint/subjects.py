"""Small runs to save and to go on with."""

import functools
import random
from typing import Any

import numpy as np
import toolz
import torch
from torch import Tensor, nn

import forgather_fn as ff
from tests.toys import labelled_batches

STEPS = 8
BATCHES = labelled_batches(STEPS, size=4)


class Small(nn.Module):
    """A model of few tensors that has one of each kind: dropout, batch statistics, a buffer that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3, bias=False)
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        self.seen = self.seen + len(features)
        out: Tensor = self.drop(self.norm(self.body(features)))
        return out


def small(**changes: Any) -> ff.Program:
    """Make a program of its own model, with all parts that a state may have."""
    plain: dict[str, Any] = {
        "model": Small,
        "loss": ff.losses.cross_entropy,
        "optimizer": ff.sgd(momentum=0.9),
        "schedule": 1e-2,
        "average": ff.ema(0.5),
    }
    return ff.single(ff.Plan(**(plain | changes)))


def finished(program: ff.Program, state: ff.TrainState, *, steps: int = STEPS) -> ff.TrainState:
    """Go on over the batches to a step."""
    return ff.fold(program.step, state, BATCHES[state.step : steps])


@functools.cache
def trajectory() -> tuple[ff.TrainState, ...]:
    """Give the states of the uninterrupted run, by step. Copy them before they are stepped."""
    program = small()
    states = [program.init(0)]
    for batch in BATCHES:
        states.append(program.step(states[-1].copy(), batch)[0])
    return tuple(states)


class Drawing:
    """A dataset that draws from all three generators."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = [index / 22, random.random(), np.random.rand(), torch.rand(()).item(), 1.0]
        return torch.tensor(drawn), index % 3


def jittered(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """A collate function that draws."""
    features = torch.stack([features for features, _ in samples])
    return features + torch.rand(len(samples), 1), torch.tensor([label for _, label in samples])


class Everything(nn.Module):
    """Dropout, batch statistics, a buffer that is assigned anew, one that grows, and one that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("history", None)
        self.register_buffer("last", torch.zeros(5), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + len(features)
            earlier = self.last.new_zeros(0) if self.history is None else self.history
            self.history = torch.cat([earlier, features.detach().mean().reshape(1)])[-5:]
            self.last.copy_(features.detach().mean(0))
        out: Tensor = self.body(features)
        return out


def everything(**changes: Any) -> ff.Program:
    """Make the program in which whatever can make a resumed run differ is switched on."""
    plain: dict[str, Any] = {
        "model": Everything,
        "loss": ff.losses.cross_entropy,
        "optimizer": ff.adamw(weight_decay=0.1),
        "schedule": ff.schedules.cosine(peak=1e-2, warmup=3, total=12),
        "transforms": (ff.noise(0.01), ff.clipped(1.0)),
        "average": ff.ema(0.9),
        "microbatches": 2,
    }
    return ff.single(ff.Plan(**(plain | changes)))


def drawing(**changes: Any) -> ff.Stream:
    """Make the stream in which whatever can make a resumed run differ is switched on."""
    plain: dict[str, Any] = {"batch_size": 6, "collate": jittered, "random": True}
    return ff.batches(Drawing(), **(plain | changes))


def run_to(steps: int, program: ff.Program, state: ff.TrainState, data: ff.Stream, *stages: Any) -> ff.TrainState:
    """Run a stream to a step."""
    final: ff.TrainState = toolz.pipe(program.steps(state, data), *stages, ff.until(steps=steps), ff.last)
    return final
