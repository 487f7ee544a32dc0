"""The processes of a pipeline, and of its copies beside it, as one of them sees them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from forgather_fn.alike import EXACT, NUMBERS, refuse, same
from forgather_fn.fingerprint import number_of
from forgather_fn.pipeline.schedules import Kind
from forgather_fn.world import World, known_to_all

T = TypeVar("T")


@attrs.frozen(eq=False)
class Line:
    """One pipeline of processes, which is one of several equal ones where data is spread as well.

    The processes of a pipeline are neighbours: of 2 pipelines of 3 processes, ranks 0 to 2 are the first.

    Attributes:
        world: All processes.
        kind: The schedule.
        stages: How many there are.
        ranks: Over how many processes they are spread.
        group: Of this pipeline's processes; ``world.group`` if it is the only one.
        copies: Of the processes that have the same stages as this one, one in each pipeline; None if it is the only
            one.
    """

    world: World
    kind: Kind
    stages: int
    ranks: int
    group: Any = None
    copies: Any = None

    @property
    def rank(self) -> int:
        """Which process of its pipeline this is."""
        return self.world.rank % self.ranks

    @property
    def number(self) -> int:
        """Which pipeline this is."""
        return self.world.rank // self.ranks

    @property
    def pipelines(self) -> int:
        """How many pipelines there are."""
        return self.world.size // self.ranks

    def rank_of(self, stage: int) -> int:
        """Tell which process of the pipeline has a stage."""
        return self.kind.rank_of(stage, self.ranks, self.stages)

    @property
    def own(self) -> tuple[int, ...]:
        """The stages of this process, in order."""
        return tuple(stage for stage in range(self.stages) if self.rank_of(stage) == self.rank)

    @property
    def last(self) -> bool:
        """Whether this process has the last stage, and so the loss."""
        return self.rank_of(self.stages - 1) == self.rank

    def summed(self, tensor: Tensor, group: Any) -> Tensor:
        """Add a tensor up over the processes of a group, in place."""
        from torch import distributed

        if group is not None:
            with self.world.explained():
                distributed.all_reduce(tensor, group=group)
        return tensor

    def taken_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Take what the first pipeline has, in place, as DistributedDataParallel does with buffers."""
        from torch import distributed

        if self.copies is not None:
            with self.world.explained():
                for tensor in tensors:
                    distributed.broadcast(tensor, group=self.copies, group_src=0)

    def alike(
        self, what: Callable[[], str], read: Callable[[], tuple[T, Any]], numbers: Callable[[], Tensor] | None = None
    ) -> tuple[T, bool]:
        """Read what all processes of a pipeline are to have alike, before anything else is sent. This is collective.

        Args:
            what: Tells what it is, in the error.
            read: Gives what was read, and what it is compared by: anything that prints alike on all processes.
            numbers: Gives those of :func:`forgather_fn.alike.numbers`, which the processes of all pipelines have alike.

        Returns:
            What was read; and whether those of the other pipelines have read the same.

        Raises:
            ValueError: They have not read the same; what each has is shown. Where it could not be read, the error of
                that, as it was raised.
        """
        error: Exception | None = None
        sign, own = "", torch.zeros(NUMBERS, dtype=torch.float64)
        try:
            value, sign = read()
            own = own if numbers is None else numbers()
        except Exception as raised:
            error = raised
        number = torch.tensor([-1 if error else number_of(f"{sign}") & EXACT], dtype=torch.float64)
        rows = self.world.rows(torch.cat([number, own]))
        told = rows[:, 0].tolist()
        pipelines = [told[at : at + self.ranks] for at in range(0, self.world.size, self.ranks)]
        if -1 in told or any(len(set(one)) > 1 for one in pipelines):
            text = f"{what()}: {sign if error is None else f'{type(error).__name__}: {error}'}"
            lines = "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(self.world.gather(text)))
            unlike = ValueError(f"the processes of a pipeline must be given the same batch, and were given:{lines}")
            raise known_to_all(error or unlike) from None
        if not same(rows[:, 1:]):
            refuse(self.world, what())
        return value, len(set(told)) == 1


def lined_up(world: World, kind: Kind, stages: int, ranks: int) -> Line:
    """Make the groups of a pipeline and its copies; collective.

    Args:
        world: All processes.
        kind: The schedule.
        stages: Of the pipeline.
        ranks: Processes of one pipeline; divides the size of the world.
    """
    line = Line(world, kind, stages, ranks)
    if world.size == 1:
        return line
    if line.pipelines == 1:
        return attrs.evolve(line, group=world.group)
    pipelines = [range(at, at + ranks) for at in range(0, world.size, ranks)]
    copies = [range(rank, world.size, ranks) for rank in range(ranks)]
    return attrs.evolve(line, group=grouped(world, pipelines), copies=grouped(world, copies))


def grouped(world: World, members: Sequence[Sequence[int]]) -> Any:
    """Make groups of processes, all of them on every process, and give the one that this process is in."""
    from torch import distributed

    mine = None
    with world.explained():
        for ranks in members:
            group = distributed.new_group(list(ranks))
            if world.rank in ranks:
                mine = group
    return mine
