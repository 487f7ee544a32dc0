"""The microbatches of one step: those of this process, and what is to be known of those of the others."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather.ml.trainer.counting import batch_size_of
from forgather_fn.world import STEP, World


@attrs.frozen(eq=False)
class Told:
    """What processes tell each other before a step: sums of small whole numbers, so that no bit depends on the order.

    Attributes:
        count: Microbatches.
        samples: Of theirs.
        weight: What they weigh: labels, or samples.
        items: Labels that losses are a mean over.
        counted: Microbatches whose items were counted.
        flos: Operations of forward and backward, as the model estimates them.
        tokens: Of the inputs, where they are counted.
        watched: Whether code of users runs between steps.
        halves: Whether somebody looks inside steps.
    """

    count: float
    samples: float
    weight: float
    items: float = 0.0
    counted: float = 0.0
    flos: float = 0.0
    tokens: float = 0.0
    watched: float = 0.0
    halves: float = 0.0


@attrs.frozen(eq=False)
class Window:
    """The microbatches of one step.

    Attributes:
        batches: Those of this process, collated, as the model takes them.
        weights: What each of them weighs: its labels, or its samples.
        first: The number of the first of them among all of the step.
        items: The number of items of the step, if it is counted.
        all: What all processes have.
        own: What this one has.
    """

    batches: list[Any]
    weights: list[float]
    first: int
    items: Any
    all: Told
    own: Told

    @property
    def count(self) -> int:
        """How many microbatches the step has, over all processes."""
        return int(self.all.count)

    def share(self, weight: float) -> float:
        """Tell what part of the step a weight is; of a step that weighs nothing, as one without labels, all the same.

        So a mean over no labels, which is nan, is seen there, and counts for nothing where others have labels.
        """
        return weight / self.all.weight if self.all.weight else 1 / self.count


def told(batches: Sequence[Any], weights: Sequence[float], **more: float) -> Told:
    """Say what this process has of a step."""
    samples = sum(batch_size_of(batch) or 1 for batch in batches)
    return Told(count=len(batches), samples=samples, weight=sum(weights), **more)


def added(world: World, mine: Told) -> Told:
    """Add up what the processes tell, in one small transfer."""
    from torch import distributed

    world.begin(STEP)
    numbers = torch.tensor(attrs.astuple(mine), dtype=torch.float64)
    with world.explained():
        distributed.all_reduce(numbers, group=world.control)
    return Told(*numbers.tolist())


def items_of(everyone: Told, device: torch.device) -> Tensor | None:
    """Give the number of items of a step, as models divide by it; None where not all microbatches were counted."""
    if not everyone.count or everyone.counted != everyone.count:
        return None
    return torch.tensor(everyone.items, dtype=torch.get_default_dtype(), device=device)
