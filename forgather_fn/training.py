"""A training as one value: what a configuration builds, and what ``forgather train`` runs."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import attrs
import toolz

from forgather_fn.checkpoint import latest
from forgather_fn.data import Stream
from forgather_fn.loop import Stage, last
from forgather_fn.plan import Program
from forgather_fn.schedules import Schedule
from forgather_fn.state import TrainState


class ScheduleFactory(Protocol):
    """Make a schedule, such as :func:`~forgather_fn.schedules.cosine`."""

    def __call__(self, *, peak: float, warmup: int, total: int, final: float) -> Schedule:
        """Rise to ``peak`` in ``warmup`` steps, and reach ``final`` at step ``total``."""
        ...


@attrs.frozen(kw_only=True, eq=False)
class Training:
    """A run that has not begun: a program, its data, and the stages that make up the loop.

    Attributes:
        program: Whose steps are made.
        data: What is trained on.
        stages: Composed onto the steps in this order: reports, evaluations, saves, the end.
        run: The run directory.
        seed: The root of all randomness.
    """

    program: Program
    data: Stream
    stages: tuple[Stage, ...] = attrs.field(converter=tuple)
    run: Path = attrs.field(converter=Path)
    seed: int = 0

    def state(self, resume: bool | Path = False, *, allow: Collection[str] = ()) -> TrainState:
        """Make the state that the run begins with.

        Args:
            resume: The checkpoint, or run, that is gone on from; True for the latest of this run's, or from the
                beginning where there is none; False for the beginning.
            allow: What may differ from the plan of the checkpoint.

        Raises:
            CheckpointError: There is a checkpoint, but it does not fit.
        """
        if isinstance(resume, Path):
            return self.program.restore(resume, allow=allow)
        if resume and latest(self.run) is not None:
            return self.program.restore(self.run, allow=allow)
        return self.program.init(self.seed)

    def train(self, resume: bool | Path = False, *, allow: Collection[str] = ()) -> TrainState:
        """Run it, and give the final state; the arguments are those of :meth:`state`."""
        steps = self.program.steps(self.state(resume, allow=allow), self.data)
        final: TrainState = toolz.pipe(steps, *self.stages, last)
        return final


def warmed_up(
    schedule: ScheduleFactory,
    *,
    peak: float,
    total: int,
    warmup: float = 0.0,
    final_div_factor: float = math.inf,
) -> Schedule:
    """Make a schedule whose warm-up and end are told as shares, so that one number changes its length.

    Args:
        schedule: Such as :func:`~forgather_fn.schedules.cosine`.
        peak: The highest value.
        total: Length of the whole, in optimizer steps.
        warmup: Share of the steps that rise, from 0 to 1.
        final_div_factor: The value at the end is the peak divided by this; infinity for 0.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> from forgather_fn.schedules import cosine
        >>> warmed_up(cosine, peak=1.0, total=20, warmup=0.1, final_div_factor=10)
        cosine(peak=1.0, warmup=2, total=20, final=0.1)
    """
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup={warmup!r}: expected the share of the steps that rise, from 0 to 1")
    if not final_div_factor >= 1:
        raise ValueError(f"final_div_factor={final_div_factor!r}: expected a number of at least 1, or infinity")
    return schedule(peak=peak, warmup=int(total * warmup), total=total, final=peak / final_div_factor)


def looks(every: int, total: int) -> frozenset[int]:
    """List the steps at which a run is looked at: the first, each multiple, and the last.

    Args:
        every: Optimizer steps between looks.
        total: Optimizer steps of the whole run.

    Raises:
        ValueError: One of them is less than 1.

    Example:
        >>> sorted(looks(10, 25))
        [1, 10, 20, 25]
    """
    if every < 1 or total < 1:
        raise ValueError(f"looks: expected integers of at least 1, got every={every!r}, total={total!r}")
    return frozenset({1, *range(every, total, every), total})
