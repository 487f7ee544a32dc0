"""Parameters that several processes have: their gradients are added up, so that their copies stay equal to the bit."""

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from forgather_fn.flat import Flat
from forgather_fn.pipeline.cuts import Assignment
from forgather_fn.pipeline.line import Line, grouped


@attrs.frozen(eq=False)
class Ties:
    """What processes of one pipeline share.

    Attributes:
        names: Of all tied parameters, on whichever processes.
        groups: For each that this process has, the group of those that have it.
        foreign: Those that this process has, and that are counted on another.
    """

    names: tuple[str, ...]
    groups: Mapping[str, Any]
    foreign: frozenset[str]

    def add(self, line: Line, gradients: Flat) -> None:
        """Add up the gradients of tied parameters over the processes that have them."""
        for name, group in self.groups.items():
            view: Tensor = gradients.alias(name)
            dense = view.contiguous()
            line.summed(dense, group)
            if dense is not view:
                view.copy_(dense)


def ties_of(line: Line, assignment: Assignment, trained: Mapping[str, object]) -> Ties:
    """Find the tied parameters, and make groups of the processes that have each; collective.

    Args:
        line: The processes.
        assignment: Which stages have which parameter.
        trained: The parameters of this process that are trained.
    """
    spread = {name: sorted({line.rank_of(stage) for stage in used}) for name, used in assignment.params.items()}
    tied = {name: ranks for name, ranks in spread.items() if len(ranks) > 1}
    groups: dict[str, Any] = {}
    made: dict[tuple[int, ...], Any] = {}
    for name, ranks in tied.items():
        members = [[at + rank for rank in ranks] for at in range(0, line.world.size, line.ranks)]
        if tuple(ranks) not in made:
            made[tuple(ranks)] = grouped(line.world, members)
        if name in trained:
            groups[name] = made[tuple(ranks)]
    return Ties(tuple(tied), groups, frozenset(name for name, ranks in tied.items() if ranks[0] != line.rank))
