"""Schedules by name: what each needs, on which rank each stage is, and the order of work on each rank.

The orders are those of ``torch.distributed.pipelining``; they are read from its classes, without processes.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Final, Literal

import attrs

Work = Literal["F", "B", "I", "W"]
"""Forward; the whole backward; the backward of the inputs alone; that of the weights, which may wait."""


class ScheduleError(ValueError):
    """A schedule cannot run so many microbatches through so many stages on so many ranks."""


@attrs.frozen
class Kind:
    """What a schedule is.

    Attributes:
        name: As torch spells it.
        stages: How many stages a rank has: exactly so many; None for any number.
        placement: ``"loop"``: rank r has the stages r, r + ranks, ...; ``"v"``: it has r and the r-th from the end.
        fills: Whether it needs as many microbatches as there are stages.
        rounds: Whether microbatches are run in equal rounds of about as many as there are ranks.
    """

    name: str
    stages: int | None = None
    placement: Literal["loop", "v"] = "loop"
    fills: bool = False
    rounds: bool = False

    def rank_of(self, stage: int, ranks: int, stages: int) -> int:
        """Tell on which rank a stage is."""
        return min(stage, stages - 1 - stage) if self.placement == "v" else stage % ranks


KINDS: Final = {
    kind.name.lower(): kind
    for kind in (
        Kind("GPipe", stages=1),
        Kind("1F1B", stages=1, fills=True),
        Kind("Interleaved1F1B", rounds=True),
        Kind("LoopedBFS"),
        Kind("InterleavedZeroBubble", rounds=True),
        Kind("ZBVZeroBubble", stages=2, placement="v"),
        Kind("DualPipeV", stages=2, placement="v", fills=True),
    )
}
"""The schedules, by name in lower case."""

_ALSO: Final = {"zbv": "zbvzerobubble"}


def kind_of(schedule: str) -> Kind:
    """Find a schedule by its name, without regard to case.

    Raises:
        ScheduleError: There is none of this name.

    Example:
        >>> kind_of("zbv").placement
        'v'
    """
    folded = schedule.lower() if isinstance(schedule, str) else ""
    name = _ALSO.get(folded, folded)
    if name not in KINDS:
        raise ScheduleError(f"schedule={schedule!r} is not one of {', '.join(kind.name for kind in KINDS.values())}")
    return KINDS[name]


@attrs.frozen
class Arrangement:
    """A schedule with its sizes, which fit.

    Attributes:
        kind: Which schedule.
        ranks: Over how many processes the stages are spread.
        stages: How many there are.
        microbatches: How many go through them in a step.
    """

    kind: Kind
    ranks: int
    stages: int
    microbatches: int

    def rank_of(self, stage: int) -> int:
        """Tell on which rank a stage is."""
        return self.kind.rank_of(stage, self.ranks, self.stages)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Give the stages of a rank, in order."""
        return tuple(stage for stage in range(self.stages) if self.rank_of(stage) == rank)


def arrange(schedule: str, *, ranks: int, stages: int, microbatches: int) -> Arrangement:
    """Make sure that a schedule can run with these sizes, before any process waits for another.

    Args:
        schedule: Its name.
        ranks: Over how many processes the stages are spread.
        stages: How many there are.
        microbatches: How many go through them in a step.

    Raises:
        ScheduleError: It cannot; the sizes that would do are named.

    Example:
        >>> arrange("ZBVZeroBubble", ranks=2, stages=4, microbatches=4).stages_of(0)
        (0, 3)
        >>> arrange("1F1B", ranks=4, stages=4, microbatches=4).stages_of(2)
        (2,)
    """
    kind = kind_of(schedule)
    if stages % ranks:
        near = sorted({max(ranks, stages // ranks * ranks), (stages // ranks + 1) * ranks})
        raise ScheduleError(
            f"{stages} stages cannot be spread evenly over {ranks} ranks: with {' or '.join(map(str, near))} stages "
            f"they can (split_spec with {' or '.join(str(n - 1) for n in near)} cuts)"
        )
    held = stages // ranks
    if kind.stages not in (None, held):
        others = [k.name for k in KINDS.values() if k.stages in (None, held) and (k.placement == "loop" or held == 2)]
        raise ScheduleError(
            f"schedule={kind.name!r} needs {kind.stages} stage{'s' * (kind.stages != 1)} on each rank, and {stages} "
            f"stages on {ranks} ranks are {held}: use {kind.stages * ranks if kind.stages else ''} stages, or one of "
            f"{', '.join(others)}"
        )
    if microbatches < 1 or (kind.fills and microbatches < stages):
        least = stages if kind.fills else 1
        raise ScheduleError(
            f"schedule={kind.name!r} with {stages} stages needs at least {least} microbatches, not {microbatches}"
        )
    rounds = max(1, microbatches // ranks)
    if kind.rounds and microbatches % rounds:
        raise ScheduleError(
            f"schedule={kind.name!r} on {ranks} ranks runs {microbatches} microbatches in {rounds} rounds, which must "
            f"be equal: use {_near(microbatches, ranks)} microbatches"
        )
    return Arrangement(kind, ranks, stages, microbatches)


def _near(microbatches: int, ranks: int) -> str:
    """Name the nearest numbers of microbatches that make equal rounds."""

    def equal(number: int) -> bool:
        return number % max(1, number // ranks) == 0

    below = next(number for number in range(microbatches, 0, -1) if equal(number))
    above = next(number for number in range(microbatches, microbatches + 2 * ranks + 1) if equal(number))
    return f"{below} or {above}"


@attrs.frozen
class Action:
    """One piece of work of a rank."""

    work: Work
    stage: int
    microbatch: int


def orders(arrangement: Arrangement) -> tuple[tuple[Action, ...], ...]:
    """Give the order of work on each rank, as torch's schedule has it."""
    if arrangement.kind.name == "1F1B":
        return tuple(_one_forward_one_backward(arrangement, rank) for rank in range(arrangement.ranks))
    from torch.distributed.pipelining import schedules as torch_schedules

    kind = torch_schedules.get_schedule_class(arrangement.kind.name)
    stands: Any = [_Stand(stage, arrangement.stages, 0, arrangement.ranks) for stage in arrangement.stages_of(0)]
    with quiet():
        schedule = kind(stands[0] if arrangement.kind.stages == 1 else stands, arrangement.microbatches)
    order = schedule.pipeline_order
    return tuple(tuple(_actions(order[rank])) for rank in range(arrangement.ranks))


def _one_forward_one_backward(arrangement: Arrangement, rank: int) -> tuple[Action, ...]:
    """Give the order that 1F1B runs in; what torch 2.13 says of it begins with microbatch 1 on the last rank."""
    number = arrangement.microbatches
    warm = min(number, arrangement.stages - rank)
    ahead = [Action("F", rank, i) for i in range(warm)]
    steady = [Action(*what) for i in range(number - warm) for what in (("B", rank, i), ("F", rank, warm + i))]
    return (*ahead, *steady, *(Action("B", rank, i) for i in range(number - warm, number)))


def _actions(given: Any) -> Iterator[Action]:
    for action in given:
        if action is None:
            continue
        work = action.computation_type.value
        if action.sub_actions is not None:
            yield from _actions(action.sub_actions)
        elif work in ("F", "B", "I", "W"):
            yield Action(work, action.stage_index, action.microbatch_index)


@attrs.define(eq=False)
class _Stand:
    """What a schedule asks of a stage to make its order, without processes and a model."""

    stage_index: int
    num_stages: int
    group_rank: int
    group_size: int
    submod: None = None
    stage_index_to_group_rank: dict[int, int] = attrs.field(factory=dict)

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging the table of a schedule; what failed is raised."""
    logger = logging.getLogger("torch.distributed.pipelining.schedules")
    disabled, logger.disabled = logger.disabled, True  # a level would empty what all loggers remember, at every step
    try:
        yield
    finally:
        logger.disabled = disabled
