"""What an evaluation keeps of its batches, on one process or on several."""

import functools
import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor

import forgather_fn as ff
from forgather.ml.trainer.nested import Gathered, interleaved, mapped
from forgather.ml.trainer.trainer_types import EvalPrediction
from forgather_fn.world import World


@attrs.define(eq=False)
class Kept:
    """What an evaluation keeps of its batches.

    Attributes:
        means: The loss of each batch, times its weight, and the weight; 0 for those that do not count.
        losses: The loss of each sample, as far as it is known: that of its batch.
        predictions: The outputs that metrics are computed of.
        labels: What they are compared with.
        inputs: What the model was given.
        samples: How many there were.
        metrics: Those of the last batch, where they are computed batch by batch.
    """

    losses: Gathered
    predictions: Gathered
    labels: Gathered
    inputs: Gathered
    means: list[ff.Mean] = attrs.field(factory=list)
    samples: int = 0
    metrics: Mapping[str, Any] | None = None

    @staticmethod
    def empty(join: bool) -> "Kept":
        """Keep nothing yet."""
        return Kept(Gathered(join), Gathered(join), Gathered(join), Gathered(join))

    def loss(self) -> float | None:
        """Give the mean loss, added up batch after batch; nan where none counts, None where no batch had one."""
        return float(functools.reduce(operator.add, self.means)) if self.means else None

    def gather(self, world: World) -> None:
        """Take what other processes keep, so that all have all batches, in the order of the data."""
        own = [ff.Mean(mean.total.cpu(), float(mean.weight)) for mean in self.means]
        found = world.gather((own, self.samples))
        self.means = interleaved([means for means, _ in found])
        self.samples = sum(samples for _, samples in found)
        for held in (self.losses, self.predictions, self.labels, self.inputs):
            held.gather(world)


def in_turn(world: World, predictions: Iterator[EvalPrediction | None]) -> Iterator[EvalPrediction | None]:
    """Give the predictions of all processes, batch by batch, in the order of the data, on all of them.

    Args:
        world: The processes.
        predictions: Of this process's batches.
    """
    if world.size == 1:
        yield from predictions
        return
    ended, done = object(), False
    while not done:
        one: Any = next(predictions, ended)
        round_ = world.gather([] if one is ended else [one and _on_cpu(one)])
        done = not all(round_)
        yield from itertools.chain.from_iterable(round_)


def _on_cpu(prediction: EvalPrediction) -> EvalPrediction:
    kept = (prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses)
    return EvalPrediction(
        *(mapped(lambda item: item.cpu() if isinstance(item, Tensor) else item, nest) for nest in kept)
    )
