"""State changes: stages that put another state in the place of a tick's, between two steps."""

import difflib
import math
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import attrs

from forgather_fn.dispatch import closing
from forgather_fn.joining import MEMBERS
from forgather_fn.loop import Demand, Stage, Steps, Tick, as_steps
from forgather_fn.mean import Mean
from forgather_fn.reducers import Reducer
from forgather_fn.reducers.base import kept_of
from forgather_fn.signature import checked
from forgather_fn.state import TrainState


class Change(Protocol):
    """Change the state between two steps."""

    def __call__(self, tick: Tick, /) -> TrainState | None:
        """Give the state to go on from, or None to leave it; its position must stay."""
        ...


@checked
def changing(change: Change) -> Stage:
    """Let a function put another state in the place of a tick's.

    Stages downstream see the new one, and the next step consumes it. It may share tensors with the old one
    (``state.controlled(...)``, ``attrs.evolve``), or have its own; the old one is consumed then. Its position (step,
    samples, seed, data) must stay. What only ``state.controls`` has to be told is plain numbers. Several processes
    change their states alike.

    Args:
        change: ``tick -> state``, or None where nothing changes.

    Raises:
        ValueError: It is written after what saves, whose checkpoints would lack the change; or, at a tick, the new
            state's position is another.

    Example:
        >>> import forgather_fn as ff
        >>> halved = ff.changing(lambda tick: tick.state.controlled({**tick.state.controls, "halved": True}))
    """
    return _changes(lambda steps: _as_tick(change))


def _as_tick(change: Change) -> Callable[[Tick], Tick]:
    def changed(tick: Tick) -> Tick:
        state = change(tick)
        return tick if state is None else tick.changed(state)

    return changed


def _changes(begin: Callable[[Steps], Callable[[Tick], Tick]], keeps: str | None = None) -> Stage:
    """Make a stage of what changes ticks, made anew for each stream that is opened, and may keep something by name."""

    def stage(steps: Steps) -> Steps:
        if "save" in as_steps(steps).answers:
            raise ValueError(
                "a stage that changes the state is written after one that saves it: a checkpoint would not have the "
                "change, and a run that goes on from it would be another. Write the change before ff.saved(...)"
            )

        def opened(demand: Demand) -> Iterator[Tick]:
            ticks = steps.open(demand if keeps is None else demand.keeping_as(keeps))
            with closing(ticks):
                changed = begin(steps)
                for tick in ticks:
                    yield changed(tick)

        return attrs.evolve(steps, open=opened)

    return stage


@checked
def folded(name: str, reducer: Reducer, *, metric: str = "loss") -> Stage:
    """Fold a metric of every step by a reducer; what it comes to is a result of the tick under ``name``.

    What the reducer keeps is ``state.controls[name]``, so that it is in the checkpoint. Reading the metric waits for
    the device at every step.

    Args:
        name: Of the result, and of what is kept.
        reducer: Such as :func:`~forgather_fn.reducers.spikes`.
        metric: Of the step.

    Raises:
        ValueError: It is written after what saves; another stage, or the schedule, keeps something under that name; or,
            at a tick, the step has no such metric, or another reducer has kept something there.

    Example:
        >>> import forgather_fn as ff
        >>> watched = ff.folded("spike", ff.reducers.spikes())
        >>> ends = ff.stopped_by(lambda tick: tick.results["spike"] > 0)
    """
    if not isinstance(name, str) or not isinstance(reducer, Reducer):
        raise ValueError(
            f"folded takes a name and a reducer, such as ff.folded('spike', ff.reducers.spikes()); got {name!r} and "
            f"{reducer!r}"
        )

    def fold(tick: Tick) -> Tick:
        kept = kept_of(reducer, tick.state.controls, name)
        value = _metric(tick, metric)
        if not isinstance(value, Mean) or float(value.weight):  # a mean over nothing says nothing
            kept = reducer.add(kept, float(value))
        changed = tick.changed(tick.state.controlled({**tick.state.controls, name: kept}))
        return changed.found({name: reducer.result(kept)})

    return _changes(lambda steps: fold, keeps=name)


def _metric(tick: Tick, name: str) -> Any:
    if name not in tick.metrics:
        known = difflib.get_close_matches(name, tick.metrics, n=len(tick.metrics), cutoff=0.0)
        raise ValueError(f"the step has no metric {name!r}; it has {', '.join(map(repr, known))}")
    return tick.metrics[name]


ROLLBACK: Final = "rollback"
"""Under what :func:`rollback` keeps its counts in ``state.controls``."""


@checked
def rollback(*, after: int, every: int, on: str | None = None) -> Stage:
    """Go back to the last good state in memory after some bad steps in a row.

    A step is bad if its loss or gradient is not finite (``Plan(on_nonfinite="skip")`` leaves its update out; in float16
    the loss alone counts, since gradients overflow while the loss scale adapts), or if the result ``on`` is not 0.
    Going back gives parameters, optimizer, average, buffers, the states of transforms, and the count of updates the
    values that they had; the position goes on, and so do tokens, the loss scale and ``controls``. So the data that did
    it are not seen again, and random numbers are not drawn again.

    Counts are ``state.controls["rollback"]``, and in the checkpoint. The copy is not: a run that is restored goes back
    to the state that it was restored to, until it has made a copy of its own. A tick at which it went back has the
    result ``rolled_back``.

    Args:
        after: How many bad steps in a row are too many.
        every: Steps between copies, in the memory of the device: as large as a state. None is made while steps are bad.
        on: A result that says whether a step is bad, such as one of ``ff.folded("spike", ff.reducers.spikes())``.

    Raises:
        ValueError: A number is less than 1; it is written after what saves; or nothing could ever be bad, since the
            plan raises at a step that is not finite, and ``on`` is None.
    """
    if not (isinstance(after, int) and isinstance(every, int) and after >= 1 and every >= 1):
        raise ValueError(f"rollback: after and every must be integers of at least 1; got {after} and {every}")
    base = _changes(lambda steps: _Rollback(steps.state.copy(), after, every, on).look, keeps=ROLLBACK)

    def stage(steps: Steps) -> Steps:
        steps = as_steps(steps)
        if on is None and steps.plan is not None and steps.plan.on_nonfinite == "raise":
            raise ValueError(
                "rollback: the plan raises at the first step that is not finite, so that no step could be bad; use "
                'Plan(on_nonfinite="skip"), or on="spike" with ff.folded("spike", ff.reducers.spikes()) before it'
            )
        return base(steps)

    return stage


@attrs.define(eq=False)
class _Rollback:
    """The copy of one stream, and how often it is made and used."""

    good: TrainState
    after: int
    every: int
    on: str | None

    def look(self, tick: Tick) -> Tick:
        """Count, and go back or copy where it is due."""
        kept = tick.state.controls.get(ROLLBACK, {"bad": 0, "times": 0})
        bad = kept["bad"] + 1 if self._bad(tick) else 0
        if bad >= self.after:
            tick = tick.changed(returned(tick.state, self.good.copy()))
            bad, kept = 0, {**kept, "times": kept["times"] + 1}
            tick = tick.found({"rolled_back": 1.0})
        elif not bad and tick.state.step % self.every == 0:
            self.good = tick.state.copy()
        new = {"bad": bad, "times": kept["times"]}
        if new == tick.state.controls.get(ROLLBACK):
            return tick
        return tick.changed(tick.state.controlled({**tick.state.controls, ROLLBACK: new}))

    def _bad(self, tick: Tick) -> bool:
        if self.on is not None:
            if self.on not in tick.results:
                known = ", ".join(map(repr, tick.results)) or "none"
                raise ValueError(
                    f"rollback: on={self.on!r} is not a result of step {tick.state.step}, which has {known}; write "
                    f"ff.folded({self.on!r}, ...) before it"
                )
            if tick.results[self.on]:
                return True
        told = ["loss"] if tick.run.program.plan.precision == "float16" else ["loss", "grad_norm"]
        if self.on is not None:  # a joint step reports what its function chooses
            told = [name for name in told if name in tick.metrics]
        found = [_metric(tick, name) for name in told]
        return not all(math.isfinite(one.total if isinstance(one, Mean) else one) for one in found)


def returned(state: TrainState, good: TrainState) -> TrainState:
    """Give a state at its position with what an earlier one had learned."""
    now, then = state.read(), good.read()
    on = {name: getattr(now, name) for name in ("skipped", "tokens", "nonfinite", "loss_scale", "controls")}
    if MEMBERS in now.controls:  # of a joint state, where the counts of its members lie
        earlier = then.controls[MEMBERS]
        own = {name: {**one, "updates": earlier[name]["updates"]} for name, one in now.controls[MEMBERS].items()}
        on["controls"] = {**now.controls, MEMBERS: own}
    return attrs.evolve(
        good,
        arrays=attrs.evolve(then, **on),
        step=state.step,
        samples=state.samples,
        data=state.data,
        batch_size=state.batch_size,
        cursor=state.cursor,
    )
