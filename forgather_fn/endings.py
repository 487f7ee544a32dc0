"""Control: stages that end the stream."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping

import attrs

from forgather_fn.data import Stream
from forgather_fn.dispatch import closing
from forgather_fn.loop import Clock, Data, Demand, Stage, Steps, Tick, as_steps
from forgather_fn.reducers import Control, stale
from forgather_fn.signature import checked
from forgather_fn.state import TrainState


@checked
def until(
    *,
    steps: int | None = None,
    epochs: float | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    clock: Clock = time.monotonic,
) -> Stage:
    """End the stream when any of these is reached; it never pulls past its last tick.

    A state that is already there gives no tick. Where the data end before, a warning says so.

    Args:
        steps: The state's step.
        epochs: Passes over the stream's data, counted in samples.
        tokens: The state's tokens. Asking waits for the device at every step.
        seconds: Since the stream was opened; several processes end together, one tick after the first finds it over.
        clock: Gives seconds.

    Raises:
        ValueError: No end is given, or one is negative; or, on opening, ``epochs`` for data of unknown length.
    """
    given = {"steps": steps, "epochs": epochs, "tokens": tokens, "seconds": seconds}
    ends = {name: end for name, end in given.items() if end is not None}
    if not ends or any(not end >= 0 for end in ends.values()):
        raise ValueError(f"until: give at least one end, none of them negative; got {ends or 'none'}")

    def stage(upstream: Steps) -> Steps:
        data = as_steps(upstream).data
        length = data.epoch_length if isinstance(data, Stream) else None
        if epochs is not None and length is None:
            raise ValueError(
                "until(epochs=...) needs a stream of known length: use ff.batches(dataset, batch_size=...); for a "
                "source that is read one sample after the other, ff.batches(source, epochs=..., ...)"
            )

        def reached(state: TrainState) -> bool:
            return (
                (steps is not None and state.step >= steps)
                or (epochs is not None and length is not None and state.samples >= epochs * length)
                or (tokens is not None and int(state.tokens) >= tokens)
            )

        def opened(demand: Demand) -> Iterator[Tick]:
            started = clock()
            if reached(upstream.state) or seconds == 0:
                return
            agreed = upstream.world.polled()
            ticks = upstream.open(demand.ending(steps).ending(_horizon(epochs, data, upstream.state)))
            with closing(ticks):
                for tick in ticks:
                    yield tick
                    if reached(tick.state):
                        return
                    if seconds is not None and agreed(clock() - started >= seconds):
                        return
            course = demand.outcome.course
            if demand.outcome.exhausted and course is not None and upstream.world.main:
                _tell_of_short_data(course.state.step, ends, data)

        return attrs.evolve(upstream, open=opened)

    return stage


def _tell_of_short_data(step: int, ends: Mapping[str, float], data: Data) -> None:
    """Warn of data that ended before what was asked for; time is what may be used, and not what is to be reached."""
    asked = " or ".join(f"{end} {name}" for name, end in ends.items() if name != "seconds")
    if not asked:
        return
    why = (
        "the stream was made with epochs=..., or its source ends: leave epochs out, and it goes on for ever"
        if isinstance(data, Stream)
        else f"a {type(data).__name__} is read once: ff.batches(dataset, batch_size=...) reads it again and again"
    )
    warnings.warn(f"the data ended at step {step}, before the {asked} that until was asked for; {why}", stacklevel=3)


def _horizon(epochs: float | None, data: Data, state: TrainState) -> int | None:
    """Tell at which step so many epochs will be over."""
    if epochs is None or not isinstance(data, Stream) or data.epoch_length is None:
        return None
    left = data.count(state.samples, epochs * data.epoch_length)
    return None if left is None else state.step + left


@checked
def early_stopped(
    metric: str = "eval_loss", *, patience: int, min_delta: float = 0.0, greater_is_better: bool = False
) -> Stage:
    """End the stream when a result has not improved for ``patience`` looks in a row.

    The best result and the count are ``state.controls["early_stopped/<metric>"]``, so that a run that goes on from a
    checkpoint counts on. A state that is there already gives no tick, as with :func:`until`; to train it further,
    restore it with ``without={"controls"}``.

    A stream that ends without a result of this name, in which it could not act, ends with a warning.

    Args:
        metric: The name of a result of an observer, upstream or downstream; not of a metric of the step.
        patience: After how many looks without improvement in a row the stream ends.
        min_delta: By how much a result must be better than the best to count.
        greater_is_better: Of the numbers compared; False where less is better.

    Raises:
        ValueError: ``patience`` is less than 1, or ``min_delta`` negative.
    """
    if patience < 1 or not min_delta >= 0:
        raise ValueError(f"early_stopped: expected patience >= 1 and min_delta >= 0; got {patience} and {min_delta}")

    control = Control(
        f"early_stopped/{metric}", metric, stale(min_delta=min_delta, greater_is_better=greater_is_better)
    )

    def over(state: TrainState) -> bool:
        return control.reducer.result(control.kept(state.controls)) >= patience

    def stage(steps: Steps) -> Steps:
        steps = as_steps(steps)

        def opened(demand: Demand) -> Iterator[Tick]:
            if over(steps.state):
                return
            ticks = steps.open(demand.keeping(control))
            with closing(ticks):
                for tick in ticks:
                    ended = over(tick.state)  # now: downstream the state may be consumed
                    yield tick
                    newest = tick.run.course.state  # which has what was found downstream
                    if ended or (not newest.consumed and over(newest)):
                        return

        return attrs.evolve(steps, open=opened)

    return stage


@checked
def stopped_by(condition: Callable[[Tick], bool]) -> Stage:
    """End the stream after the first tick for which a condition holds."""

    def stage(steps: Steps) -> Steps:
        steps = as_steps(steps)

        def opened(demand: Demand) -> Iterator[Tick]:
            ticks = steps.open(demand)
            with closing(ticks):
                for tick in ticks:
                    yield tick
                    if condition(tick):
                        return

        return attrs.evolve(steps, open=opened)

    return stage
