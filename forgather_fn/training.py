"""A training as one value: what a configuration builds, and what ``forgather train`` runs."""

import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import attrs
import toolz
from torch import nn

from forgather_fn import interrupt
from forgather_fn.average import Average
from forgather_fn.checkpoint import latest, saved
from forgather_fn.data import Stream
from forgather_fn.dispatch import closing
from forgather_fn.endings import until
from forgather_fn.loop import Demand, Stage, Steps, Tick, last
from forgather_fn.losses import Loss
from forgather_fn.model import ModelFactory
from forgather_fn.observers import evaluated, report
from forgather_fn.optim import Optimizer
from forgather_fn.plan import Plan, Precision
from forgather_fn.program import Program
from forgather_fn.reports import Sink
from forgather_fn.schedules import Schedule, cosine
from forgather_fn.stages import Observe, Observer, at, every
from forgather_fn.state import TrainState
from forgather_fn.strategy.single import single
from forgather_fn.transforms import Transform, clipped


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
    stages: tuple[Stage, ...]
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
        """Run it, and give the final state; the arguments are those of :meth:`state`.

        ``forgather control`` sees it while it runs, and can tell it what to do.
        """
        from forgather_fn.control.serving import serve
        from forgather_fn.control.stage import controlled

        steps = self.program.steps(self.state(resume, allow=allow), self.data)
        with serve(self.run) as inbox:
            final: TrainState = toolz.pipe(steps, *self.stages, controlled(inbox), last)
        return final


def noting(signals: list[int]) -> Stage:
    """Note which signal has ended the stream, 0 if none has: after Ctrl-C it ends as if it were done.

    Args:
        signals: What it is added to.
    """

    def stage(steps: Steps) -> Steps:
        def opened(demand: Demand) -> Iterator[Tick]:
            ticks = steps.open(demand)
            try:
                with closing(ticks):
                    yield from ticks
            finally:
                signals.append(interrupt.requested())

        return attrs.evolve(steps, open=opened)

    return stage


class StreamFactory(Protocol):
    """Make a stream of batches, such as :func:`~forgather_fn.data.batches` with its data set given."""

    def __call__(self, *, batch_size: int) -> Stream:
        """Give batches of so many samples."""
        ...


class Strategy(Protocol):
    """Make a program of a plan, such as :func:`~forgather_fn.strategy.single.single`."""

    def __call__(self, plan: Plan, /) -> Program:
        """Say how the plan is carried out."""
        ...


def assembled(
    *,
    model: nn.Module | ModelFactory,
    loss: Loss,
    optimizer: Optimizer,
    data: StreamFactory,
    run: str | Path,
    eval_data: Stream | None = None,
    max_steps: int,
    batch_size: int,
    learning_rate: float,
    schedule: ScheduleFactory = cosine,
    warmup_ratio: float = 0.0,
    final_div_factor: float = math.inf,
    max_grad_norm: float | None = 1.0,
    transforms: Iterable[Transform] = (),
    average: Average | None = None,
    microbatches: int = 1,
    precision: Precision = "as_built",
    on_nonfinite: Literal["raise", "skip"] = "raise",
    compile: bool | Literal["model"] = False,
    device: str = "cpu",
    seed: int = 0,
    logging_steps: int = 10,
    eval_steps: int = 100,
    save_steps: int = 100,
    save_total_limit: int | None = None,
    observers: Iterable[Observe | Observer] = (),
    sinks: Iterable[Sink] = (),
    stages: Iterable[Stage] = (),
    strategy: Strategy = single,
) -> Training:
    """Put together the training that most configurations describe: evaluate, report, save, stop.

    It is looked at, evaluated and reported at the first step, each multiple, and the last; saved at each multiple, and
    at the end.

    Args:
        model: As in :class:`~forgather_fn.plan.Plan`, and so are ``loss``, ``optimizer``, ``average``,
            ``microbatches``, ``precision``, ``on_nonfinite``, ``compile`` and ``device``.
        loss: What is minimised.
        optimizer: What updates the parameters.
        data: Makes the stream that is trained on, given ``batch_size``.
        run: The run directory, for checkpoints.
        eval_data: What is evaluated on; None for no evaluation.
        max_steps: Optimizer steps of the whole run.
        batch_size: Samples in a step.
        learning_rate: The highest, after the warm-up.
        schedule: Makes the schedule; see :func:`warmed_up` for ``warmup_ratio`` and ``final_div_factor``.
        warmup_ratio: Share of the steps that rise.
        final_div_factor: What the learning rate is divided by at the end.
        max_grad_norm: What the norm of the gradient is clipped to, after ``transforms``; None for no clipping.
        transforms: What gradients pass through.
        average: Of the parameters.
        microbatches: Parts of a batch.
        precision: Of forward and backward.
        on_nonfinite: What happens at a step that is not finite.
        compile: What is compiled: nothing, the whole step (True), or the model.
        device: Where it runs.
        seed: The root of all randomness.
        logging_steps: Optimizer steps between reports.
        eval_steps: Optimizer steps between evaluations.
        save_steps: Optimizer steps between saves.
        save_total_limit: How many of the newest checkpoints are kept; None for all.
        observers: Look at each evaluation's tick, after it.
        sinks: Where reports go.
        stages: Further stages, before the report.
        strategy: Makes the program.
    """
    clipping = () if max_grad_norm is None else (clipped(max_grad_norm),)
    plan = Plan(
        model=model,
        loss=loss,
        optimizer=optimizer,
        schedule=warmed_up(
            schedule, peak=learning_rate, total=max_steps, warmup=warmup_ratio, final_div_factor=final_div_factor
        ),
        transforms=(*transforms, *clipping),
        average=average,
        microbatches=microbatches,
        precision=precision,
        on_nonfinite=on_nonfinite,
        compile=compile,
        device=device,
    )
    looked = () if eval_data is None else (evaluated(eval_data),)
    return Training(
        program=strategy(plan),
        data=data(batch_size=batch_size),
        stages=(
            at(looks(eval_steps, max_steps), *looked, *observers),
            *stages,
            at(looks(logging_steps, max_steps), report(*sinks)),
            every(save_steps, saved(run, keep=save_total_limit)),
            until(steps=max_steps),
        ),
        run=Path(run),
        seed=seed,
    )


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
        warmup: Share of the steps that rise, from 0 to 1, rounded to whole steps.
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
    return schedule(peak=peak, warmup=round(total * warmup), total=total, final=peak / final_div_factor)


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
