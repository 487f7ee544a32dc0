"""What the steps of several processes have in common, agreed on at the first of them."""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from forgather_fn.flat import Flat
from forgather_fn.mean import Mean
from forgather_fn.reduction import Counter
from forgather_fn.world import World


@attrs.define(eq=False)
class Agreement:
    """What processes know of each other's steps: one may have no microbatch to tell it by.

    Attributes:
        names: Of the loss's means; empty before the first step.
        moving: Whether forward passes change the model's buffers.
    """

    names: tuple[str, ...] = ()
    moving: bool = False

    def reach(self, world: World, means: Sequence[Mapping[str, Mean]], before: Flat, after: Flat) -> bool:
        """Agree, the first time.

        Args:
            world: The processes.
            means: Of the loss, for each microbatch that this one has run.
            before: The model's buffers before that.
            after: The same after it.

        Returns:
            Whether it was the first time.

        Raises:
            ValueError: The loss names other means for some microbatches than for others.
        """
        first = not self.names
        kinds = {tuple(sorted(found)) for found in means} | (set() if first else {self.names})
        if first:
            told = world.gather((kinds, _changed(before, after)))
            kinds = set().union(*(names for names, _ in told))
            self.names, self.moving = min(kinds), any(moved for _, moved in told)
        if len(kinds) > 1:
            raise ValueError(f"the loss names other means for some microbatches than for others: {sorted(kinds)}")
        return first

    def sums(self, found: Sequence[Mapping[str, Mean]], device: torch.device) -> Tensor:
        """Add up totals and weights over microbatches: float64, in aligned pairs, a pair of numbers for each name."""
        counter = Counter()
        for means in found:
            pairs = [number for name in self.names for number in (means[name].total, means[name].weight)]
            counter.add([torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in pairs])])
        return counter.total([torch.zeros(2 * len(self.names), dtype=torch.float64, device=device)])[0]

    def means(self, numbers: Tensor) -> dict[str, Mean]:
        """Read means from sums over all processes."""
        pairs = numbers.view(-1, 2)
        return {name: Mean(total, weight) for name, (total, weight) in zip(self.names, pairs, strict=True)}

    def take_buffers(self, world: World, buffers: Flat) -> None:
        """Take the buffers of the first process everywhere, if they move, as DistributedDataParallel does."""
        from torch import distributed

        if world.size > 1 and self.moving:
            with world.explained():
                for buffer in buffers.buffers:
                    distributed.broadcast(buffer, group=world.group, group_src=0)


def _changed(before: Flat, after: Flat) -> bool:
    same = before.layout is after.layout and all(map(torch.equal, before.buffers, after.buffers))
    return not same
