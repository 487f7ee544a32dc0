"""A schedule run in thought: what each rank does when, and for how long it waits."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

from forgather_fn.pipeline.schedules import Action, Work

COSTS: Final[Mapping[Work, float]] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""What each kind of work takes, in units of a stage's forward pass of one microbatch: a backward takes twice that."""


@attrs.frozen
class Timed:
    """One piece of work, from when to when."""

    action: Action
    start: float
    stop: float


@attrs.frozen
class Simulation:
    """A schedule run in thought.

    Attributes:
        ranks: For each rank, what it does, in order.
        length: When the last has ended.
    """

    ranks: tuple[tuple[Timed, ...], ...]
    length: float

    @property
    def busy(self) -> tuple[float, ...]:
        """For each rank, for how long it works."""
        return tuple(sum(timed.stop - timed.start for timed in rank) for rank in self.ranks)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait."""
        return 1.0 - sum(self.busy) / (self.length * len(self.ranks))


def simulate(orders: Sequence[Sequence[Action]], stages: int, costs: Sequence[float] | None = None) -> Simulation:
    """Run orders of work in thought: each rank does its own in order, each as soon as what it needs is there.

    Transfers take no time.

    Args:
        orders: For each rank.
        stages: How many there are.
        costs: For each stage, how long its forward pass takes; all alike if not given.

    Raises:
        ValueError: The orders wait for each other for ever.
    """
    weights = costs or [1.0] * stages
    ended: dict[Action, float] = {}
    done: list[list[Timed]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while len(done[rank]) < len(order):
                action = order[len(done[rank])]
                needs = [_end(ended, kind) for kind in _needs(action, stages)]
                if None in needs:
                    break
                own = done[rank][-1].stop if done[rank] else 0.0
                start = max([own, *(need for need in needs if need is not None)])
                stop = start + COSTS[action.work] * weights[action.stage]
                done[rank].append(Timed(action, start, stop))
                ended[action] = stop
                moved = True
    if any(len(one) < len(order) for one, order in zip(done, orders, strict=True)):
        raise ValueError("these orders wait for each other for ever")
    return Simulation(tuple(map(tuple, done)), max(one[-1].stop for one in done))


def _needs(action: Action, stages: int) -> list[tuple[Action, ...]]:
    """Name what must have ended before a piece of work: of each tuple, any one."""
    stage, number = action.stage, action.microbatch
    if action.work == "F":
        return [(Action("F", stage - 1, number),)] if stage else []
    if action.work == "W":
        return [(Action("I", stage, number),)]
    after = [(Action("B", stage + 1, number), Action("I", stage + 1, number))] if stage < stages - 1 else []
    return [(Action("F", stage, number),), *after]


def _end(ended: Mapping[Action, float], any_of: tuple[Action, ...]) -> float | None:
    return next((ended[action] for action in any_of if action in ended), None)


def picture(simulation: Simulation, *, width: int = 100) -> str:
    """Draw a simulation: a line a rank, time from left to right, at most ``width`` columns.

    A forward pass is its microbatch's number, a whole backward pass the number in brackets, ``i`` that of the inputs
    and ``w`` that of the weights alone; dots are waiting. A rank's second stage has a ``'``, its third ``''``.
    """
    unit = min(timed.stop - timed.start for rank in simulation.ranks for timed in rank)
    held = [sorted({timed.action.stage for timed in rank}) for rank in simulation.ranks]
    columns = math.ceil(simulation.length / unit - 1e-9)
    rows = [["."] * columns for _ in simulation.ranks]
    cell = 2
    for row, rank, stages in zip(rows, simulation.ranks, held, strict=True):
        for timed in rank:
            first, last = round(timed.start / unit), max(round(timed.start / unit) + 1, round(timed.stop / unit))
            label = _label(timed.action, stages.index(timed.action.stage))
            row[first:last] = [label, *("" for _ in range(last - first - 1))]
            cell = max(cell, math.ceil((len(label) + 1) / (last - first)))
    shown = max(1, (width - 8) // cell)
    lines = [f"rank {rank:<3}" + _line(row, cell)[: shown * cell].rstrip() for rank, row in enumerate(rows)]
    more = [f"... and {columns - shown} of {columns} columns more"] if columns > shown else []
    return "\n".join(lines + more)


def _line(row: Sequence[str], cell: int) -> str:
    """Write the cells of a row; an empty one belongs to the piece of work before it."""
    text = ""
    for i, label in enumerate(row):
        if label:
            text = text.ljust(i * cell) + label
    return text.ljust(len(row) * cell)


def _label(action: Action, local: int) -> str:
    number = f"{action.microbatch}{chr(39) * local}"
    return {"F": number, "B": f"[{number}]", "I": f"i{number}", "W": f"w{number}"}[action.work]
