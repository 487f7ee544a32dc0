"""What every arm does: the same updates, from the same weights, on the same samples in the same order."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Final

import attrs
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset

from benchmarks import models
from benchmarks.models import Shape, next_token_loss

Batch = dict[str, Tensor]

PEAK: Final = 3e-3
WEIGHT_DECAY: Final = 0.1
MAX_NORM: Final = 0.25
"""Low enough that nearly every step is clipped, so that an arm which does not clip ends at another loss."""

REPORT_EVERY: Final = 10
"""Steps between two looks at the loss, which every arm keeps in a list."""


class Rows(Dataset[Batch]):
    """A map-style dataset as people write it: one sample, a dict of tensors, at a time."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


@attrs.frozen(kw_only=True, slots=False)
class Task:
    """One training, to be done by every arm.

    Attributes:
        name: Of the model, for tables.
        shape: The model's.
        batch_size: Samples in a step.
        warmup: Steps before the clock starts.
        steps: Steps that are timed.
        build: Builds the model of a shape, with its initial weights.
    """

    name: str
    shape: Shape
    batch_size: int
    warmup: int
    steps: int
    build: Callable[[Shape], nn.Module] = models.built

    @property
    def updates(self) -> int:
        """Steps of a whole run: one more than is timed, in which the clock stops."""
        return self.warmup + self.steps + 1

    @property
    def size(self) -> str:
        """Say how large a step is."""
        return f"{self.name}, {self.batch_size} x {self.shape.context} tokens a step"

    def model(self) -> nn.Module:
        """Build the model with its initial weights."""
        return self.build(self.shape)

    @cached_property
    def tokens(self) -> Tensor:
        """The training samples: arithmetic progressions, int64 ``[samples, context]``, enough for one epoch."""
        return _progressions(self.shape, self.updates * self.batch_size, seed=1)

    @cached_property
    def held_out(self) -> Tensor:
        """Samples that no arm trains on."""
        return _progressions(self.shape, 64, seed=2)

    @cached_property
    def order(self) -> Tensor:
        """The order of the samples: that of torch's own sampler, and transformers.Trainer's, under seed 0."""
        return torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(0))

    @cached_property
    def batches(self) -> list[Batch]:
        """All batches, made beforehand."""
        return list(self.fetched())

    def fetched(self) -> Iterator[Batch]:
        """Make the batches, when they are asked for, by the fewest operations."""
        for part in torch.split(self.order, self.batch_size):
            yield {"input_ids": self.tokens[part], "labels": self.tokens[part]}

    def loss(self, model: nn.Module) -> float:
        """Measure a trained model."""
        with torch.no_grad():
            return float(next_token_loss(model(self.held_out), self.held_out))


def _progressions(shape: Shape, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(shape.vocabulary, (samples, 1), generator=generator)
    stride = torch.randint(1, 8, (samples, 1), generator=generator)
    return (start + stride * torch.arange(shape.context)) % shape.vocabulary


def optimizer_of(model: nn.Module) -> AdamW:
    """Make AdamW as recipes for language models do: fused, no decay for biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=PEAK, fused=True)
