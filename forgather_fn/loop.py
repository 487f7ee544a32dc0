"""The loop: a stream of ticks that stages are composed onto, and its two ends.

A stage maps :class:`Steps` to :class:`Steps`. Observers (:mod:`forgather_fn.stages`) look at ticks; changes
(:mod:`forgather_fn.changes`) put another state in the place of a tick's; control (:mod:`forgather_fn.endings`) ends the
stream. They act in the order in which they are written. What
observers want of a step is known before it runs, so that a step that nobody looks at never waits for the device.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import attrs

from forgather_fn import interrupt, joining
from forgather_fn.course import Course as Course
from forgather_fn.course import Demand as Demand
from forgather_fn.course import heard, tell_of_silence
from forgather_fn.data import Stream
from forgather_fn.dispatch import closing
from forgather_fn.plan import Plan
from forgather_fn.program import Metrics, Program
from forgather_fn.state import TrainState, as_state, raise_if_nonfinite
from forgather_fn.world import ALONE, World

Clock = Callable[[], float]
Data = Iterable[Any] | Stream
"""What a run is trained on: a stream, which starts anywhere, or any iterable of batches, which starts where it does."""
Batch = TypeVar("Batch")


@attrs.frozen(eq=False)
class Run:
    """What the ticks of one stream have in common.

    Attributes:
        program: Whose steps they are.
        data: What it is trained on.
        started: The step at which the stream began.
        horizon: The step at which the run ends, where a stage downstream knows it.
        course: Where it stands.
    """

    program: Program
    data: Data
    started: int
    horizon: int | None
    course: Course

    def epoch(self, samples: int) -> float | None:
        """Tell how many passes over the data a number of samples is; None where its length is not known."""
        length = self.data.epoch_length if isinstance(self.data, Stream) else None
        return None if length is None else samples / length


@attrs.frozen(eq=False)
class Tick:
    """One step that was made.

    Attributes:
        state: After the step; the next step consumes it.
        metrics: Of the step, still on the device.
        batch: What was consumed.
        run: The program and the data.
        results: What observers upstream found at this tick.
    """

    state: TrainState
    metrics: Metrics
    batch: Any = attrs.field(repr=lambda batch: f"<{type(batch).__name__}>")
    run: Run = attrs.field(repr=False)
    results: Mapping[str, float] = attrs.field(factory=dict)

    def changed(self, state: TrainState) -> "Tick":
        """Put another state in the place of this one: what comes later sees it, and the next step consumes it.

        Several processes change theirs alike, at the same tick.

        Args:
            state: It shares tensors with this tick's state, or has its own; this tick's is consumed then.

        Raises:
            ValueError: The position is another (step, samples, seed, data), which the open stream would not follow; or
                this is not the tick that the stream stands at.
        """
        course, mine = self.run.course, self.state
        if course.state is not mine:
            raise ValueError(
                f"the stream stands at step {course.state.step} and another state than this tick's, of step "
                f"{mine.step}: a state is changed when its tick has just been made, by one stage after the other"
            )
        if _position(state) != _position(mine):
            raise ValueError(
                f"a change between two steps leaves the position as it is: {_position(mine)}; got {_position(state)}"
            )
        if not state.shares(mine) and not mine.consumed:
            mine.consume(f"a change after step {mine.step}")
        state.read()
        course.state = state
        return attrs.evolve(self, state=state)

    def found(self, results: Mapping[str, float], by: object = None) -> "Tick":
        """Add results, and let what reacts to them do so: schedules of the plan, and stages downstream.

        Args:
            results: By name.
            by: What found them. It may look at a tick again, and find other values.

        Raises:
            ValueError: A name is that of a metric of the step, or of another result of this tick with another value.
        """
        course = self.run.course
        own = [name for name in results if by is not None and course.found.get(name) is by]
        check_found(results, self, {name: value for name, value in self.results.items() if name not in own})
        tick = attrs.evolve(self, results={**self.results, **results})
        course.found |= dict.fromkeys(results, by)
        for control in course.controls:
            if control.metric in results:
                number = float(self.run.program.world.broadcast(float(results[control.metric])))
                controls = tick.state.controls
                kept = control.reducer.add(control.kept(controls), number)
                tick = tick.changed(tick.state.controlled({**controls, control.name: kept}))
        return tick


def check_found(results: Mapping[str, float], tick: Tick, others: Mapping[str, float]) -> None:
    """Make sure that no result takes the place of another number of its tick, which nobody would see.

    Args:
        results: What an observer has just found.
        tick: Where.
        others: What others found there.

    Raises:
        ValueError: A name is that of a metric of the step, or of another result with another value.
    """
    for name, value in results.items():
        if name in tick.metrics:
            raise ValueError(
                f"an observer found {name!r} at step {tick.state.step}, which is the name of a metric of the step; "
                "give it another name: ff.evaluated(..., name='other') begins its results with one"
            )
        before = others.get(name, value)
        if before != value and not (before != before and value != value):
            raise ValueError(
                f"two observers found {name!r} at step {tick.state.step}: {before} and {value}; give one of them "
                "another name: ff.evaluated(..., name='other') begins its results with one"
            )


def _position(state: TrainState) -> tuple[Any, ...]:
    return state.step, state.samples, state.seed, state.data, state.batch_size, state.cursor


class Answer(Protocol):
    """Do at a tick, because someone asked for it, what is otherwise done on a schedule."""

    def __call__(self, tick: Tick, /) -> "Future[Mapping[str, Any]]":
        """Begin, and give what will say, in plain data, what was done; what went wrong is raised or is its exception.

        Several processes call it together.
        """
        ...


@attrs.frozen(eq=False)
class Steps(Iterable[Tick]):
    """A stream of ticks that has not started: iterate it, or compose stages onto it.

    Attributes:
        state: Where it starts.
        data: What it runs over.
        open: ``demand -> iterator``; stages pass the demands from below on to the source.
        world: The processes that run it together.
        answers: What the observers so far can be asked for at any tick, by name: ``"save"``, ``"evaluate"``.
        plan: What its steps are made of; None for ticks from elsewhere.
    """

    state: TrainState
    data: Data
    open: Callable[[Demand], Iterator[Tick]]
    world: World = ALONE
    answers: Mapping[str, tuple[Answer, ...]] = attrs.field(factory=dict)
    plan: Plan | None = None

    def __iter__(self) -> Iterator[Tick]:
        """Run the stream; signals that ask it to end are heeded while it runs."""
        with interrupt.listening() as signalled:
            demand = Demand()
            yield from self.open(demand)
            if signalled() in interrupt.PREEMPTIONS:
                raise interrupt.Preempted(signalled())
            if demand.outcome.course is not None and self.world.main and not signalled():
                tell_of_silence(demand.outcome.course, evaluated="evaluate" in self.answers)


Stage = Callable[[Steps], Steps]


def as_steps(given: Any) -> Steps:
    """Take what a stage, or the end of a pipe, is called with.

    Raises:
        ValueError: It is no stream of steps.
    """
    if isinstance(given, Steps):
        return given
    why = "a pipe begins with program.steps(state, data)"
    if given is None:
        why = (
            "what stands before it is no stage, and gave nothing; what looks at ticks stands in one, ff.every(1, print)"
        )
    elif isinstance(given, TrainState):
        why = f"{why}, and ff.last, which gives a state, is its end"
    elif callable(given):
        why = f"{why}: toolz.pipe(program.steps(state, data), ff.until(steps=100), ff.last)"
    kind = type(given).__name__
    raise ValueError(f"expected steps, got {'an' if kind[0] in 'AEIOU' else 'a'} {kind}: {why}")


def open_steps(program: Program, state: TrainState, data: Data) -> Steps:
    """Make the stream of ticks of a program, from a state, over data.

    A stream (:func:`~forgather_fn.data.batches`) starts at the sample that the state names; any other iterable starts
    where it starts. Ctrl-C ends the stream after the running step and what observes it; the second one at once. So do
    SIGTERM and SIGUSR1, between the microbatches of a step; the iteration then ends by
    :class:`~forgather_fn.interrupt.Preempted`.

    Raises:
        ValueError: The state was trained on another stream, or the stream's batches are smaller than the microbatches.
    """
    state = as_state(state)
    if isinstance(data, Stream):
        fingerprint = data.fingerprint(state.seed, program.share)
        if state.data is not None and state.data != fingerprint:
            raise ValueError(
                "this state was trained on another stream of data; going on would repeat and miss samples.\n"
                f"  the state:  {state.data}\n  the stream: {fingerprint}\n"
                "To start anew on other data with these weights, use attrs.evolve(state, data=None, cursor=None, "
                "samples=0)."
            )
        batch_size = data.batch_size if isinstance(data.batch_size, int) else str(data.batch_size)
        if state.batch_size not in (None, batch_size):
            raise ValueError(
                f"this state was trained with batch_size={state.batch_size}, the stream has batch_size="
                f"{batch_size}: that is another training. To go on with it on purpose, restore with "
                'allow={"batch_size"}, or use attrs.evolve(state, batch_size=None).'
            )
        if data.least is not None and data.least < program.plan.microbatches:
            raise ValueError(
                f"microbatches={program.plan.microbatches}, but batch_size={batch_size}: each microbatch needs at "
                "least one sample"
            )
        state = attrs.evolve(state, data=fingerprint, batch_size=batch_size)
    return Steps(state, data, lambda demand: _ticks(program, state, data, demand), program.world, plan=program.plan)


def _ticks(program: Program, state: TrainState, data: Data, demand: Demand) -> Iterator[Tick]:
    """The source: pseudocode and code are the same.

    for batch in data: state, metrics = step(state, batch); yield the tick
    """
    if isinstance(data, Stream) and data.total_samples is not None:
        left = data.count(state.samples, data.total_samples)
        demand = demand.ending(None if left is None else state.step + left)
    for name in (*(control.name for control in program.plan.controls), joining.MEMBERS):
        demand.keeping_as(name)
    course = demand.outcome.course = Course(state, (*program.plan.controls, *demand.controls))
    run = Run(program, data, state.step, demand.horizon, course)
    batches = program.batches(state, data)
    agreed = program.world.polled()
    with program.world.telling(), heard(course), closing(batches), contextlib.suppress(interrupt.Interrupted):
        if program.world.size == 1:  # several heed a signal together, after a step
            interrupt.check()
        for batch in batches:
            course.state, metrics = program.step(course.state, batch, wants=demand.at(course.state.step + 1))
            course.metrics = metrics
            yield Tick(course.state, metrics, batch, run)
            if number := agreed(interrupt.requested()):
                interrupt.adopt(number)
                return
        demand.outcome.exhausted = True


def last(steps: Steps) -> TrainState:
    """Run a stream to its end and give the final state; the state that it started from, if it had no tick.

    Raises:
        NonFiniteError: A step was not finite, and the plan does not skip such steps.
    """
    state = as_steps(steps).state
    for tick in steps:
        state = tick.state
    raise_if_nonfinite(state)
    return state


def fold(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], state: TrainState, batches: Iterable[Batch]
) -> TrainState:
    """Fold a step over batches, and give the final state.

    Training is a fold: ``fold(step, state, a + b) == fold(step, fold(step, state, a), b)``, and going on from a saved
    state is its corollary.

    Raises:
        TypeError: ``batches`` is a stream, which says too little: ``stream.start(seed=0, samples=0)`` gives batches.
    """
    # iter: a stream says how it is read, where reduce would say that it does not support iteration
    return functools.reduce(lambda state, batch: step(state, batch)[0], iter(batches), state)
