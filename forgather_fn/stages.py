"""Observers and when they look: stages that see ticks and never change the state."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn, Protocol

import attrs

from forgather_fn import interrupt
from forgather_fn.dispatch import closing
from forgather_fn.loop import Answer, Clock, Demand, Stage, Steps, Tick, as_steps, check_found
from forgather_fn.signature import checked, shown


class Observe(Protocol):
    """Look at a tick."""

    def __call__(self, tick: Tick, /) -> Mapping[str, float] | None:
        """Give named results for observers downstream and reports, or None."""
        ...


@attrs.frozen(eq=False)
class Observer:
    """An observer that needs more than a call. A plain function of a tick is taken wherever one of these is.

    Attributes:
        observe: The function.
        wants: Metrics that the step must compute for it.
        open: Called before the first step, by each stage that it stands in; see :func:`once`.
        end: Called with the last tick, when the stream ends other than by an exception.
        close: Called as often as it was opened, when a stream that was begun ends, however it ends.
        answers: What it can be asked for off its schedule, by name; stages downstream find it in ``Steps.answers``.
    """

    observe: Observe
    wants: frozenset[str] = frozenset()
    open: Callable[[Steps], None] = lambda steps: None
    end: Callable[[Tick], None] = lambda tick: None
    close: Callable[[], None] = lambda: None
    answers: Mapping[str, Answer] = attrs.field(factory=dict)

    def __call__(self, *_: object) -> NoReturn:
        """Say where it belongs: an observer in the place of a stage would be called with the steps.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "an observer is not a stage, and does not say when it looks: put it into one, ff.every(100, observer), "
            "ff.at((1, 10), observer) or ff.at_end(observer)"
        )


def once(observer: Observer) -> Observer:
    """Let an observer stand in several stages of a stream: the first opens it, and the last closes it."""
    opens = 0

    def opened(steps: Steps) -> None:
        nonlocal opens
        if not opens:
            observer.open(steps)
        opens += 1

    def close() -> None:
        nonlocal opens
        opens -= 1
        if not opens:
            observer.close()

    return attrs.evolve(observer, open=opened, close=close)


def _answering(steps: Steps, observers: Iterable[Observer]) -> Steps:
    """Add what observers can be asked for; one that stands in several stages counts once."""
    answers = dict(steps.answers)
    for observer in observers:
        for name, answer in observer.answers.items():
            answers[name] = tuple(dict.fromkeys((*answers.get(name, ()), answer)))
    return attrs.evolve(steps, answers=answers)


def _as_observer(observer: Observer | Observe) -> Observer:
    if not (isinstance(observer, Observer) or callable(observer)):
        raise ValueError(f"an observer is a function of a tick, such as ff.saved(...) gives; got {shown(observer)}")
    return observer if isinstance(observer, Observer) else Observer(observer)


def observing(due: Callable[[Tick], bool], wants: Callable[[int], bool], *observers: Observer | Observe) -> Stage:
    """Let observers look at the ticks that are due; the base of :func:`every`, :func:`at` and others.

    Args:
        due: Whether a tick is looked at.
        wants: Whether a step might be, by the number that it leads to; asked before the step.
        observers: In the order in which they look; each sees the results of those before.

    Raises:
        ValueError: One is not a function.
    """
    lifted = [_as_observer(observer) for observer in observers]
    names = frozenset(itertools.chain.from_iterable(observer.wants for observer in lifted))

    def stage(steps: Steps) -> Steps:
        saves = "save" in as_steps(steps).answers

        def opened(demand: Demand) -> Iterator[Tick]:
            ticks = steps.open(demand.wanting(lambda step: names if wants(step) else frozenset()) if names else demand)
            last: Tick | None = None
            with _all_open(steps, lifted):
                try:
                    with closing(ticks):
                        for tick in ticks:
                            last = tick
                            if due(tick):
                                tick = _observed(tick, lifted, saves)
                            yield tick
                except GeneratorExit:  # of a stage downstream: what stands upstream has ended now
                    _ended(last, lifted)
                    raise
                _ended(last, lifted)

        return attrs.evolve(_answering(steps, lifted), open=opened)

    return stage


def _all_open(steps: Steps, observers: Iterable[Observer]) -> contextlib.ExitStack:
    """Open observers, and give what closes them; if one fails to open, those before it are closed."""
    with contextlib.ExitStack() as stack:
        for observer in observers:
            observer.open(steps)
            stack.callback(observer.close)
        return stack.pop_all()


def _ended(last: Tick | None, observers: Iterable[Observer]) -> None:
    """Let observers look at the last tick, with the state as stages downstream have left it."""
    if last is None:
        return
    newest = last.run.course.state
    if newest is not last.state and newest.step == last.state.step:
        last = attrs.evolve(last, state=newest)
    if not last.state.consumed:
        last = attrs.evolve(last, results={**last.results, **last.run.course.ended})
        for observer in observers:
            observer.end(last)


def _observed(tick: Tick, observers: Iterable[Observer], saves: bool) -> Tick:
    """Let observers look one after the other; ``saves`` says whether one before them has saved this tick."""
    for observer in observers:
        found = None
        with contextlib.suppress(interrupt.Interrupted):  # an evaluation that was cut short; the stream ends after it
            found = observer.observe(tick)
        if found and saves:
            _check_order(tick, found)
        if found:
            tick = tick.found(found, by=observer.observe)
        saves = saves or "save" in observer.answers
    return tick


def _check_order(tick: Tick, found: Iterable[str]) -> None:
    for control in tick.run.course.controls:
        if control.metric in found:
            raise ValueError(
                f"the result {control.metric!r} changes the state (controls[{control.name!r}]), and is found after "
                "what saves: a checkpoint would not have it. Write ff.saved(...) after the observer that finds it"
            )


@checked
def every(steps: int, *observers: Observer | Observe) -> Stage:
    """Look at every tick whose step is a multiple of ``steps``.

    Args:
        steps: Optimizer steps between looks.
        observers: Functions of a tick, or :class:`Observer` records.

    Raises:
        ValueError: ``steps`` is not a positive integer.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"every: the number of steps must be an integer of at least 1, got {steps!r}")
    return observing(lambda tick: tick.state.step % steps == 0, lambda step: step % steps == 0, *observers)


@checked
def at(steps: int | Iterable[int], *observers: Observer | Observe) -> Stage:
    """Look at the ticks of these steps.

    Args:
        steps: One step number, or several: ``at((1, 10, 100), ...)``.
        observers: As in :func:`every`.

    Raises:
        ValueError: They are no integers of at least 1: the first tick is that of step 1.
    """
    numbers = [steps] if isinstance(steps, int) else list(steps)
    odd = [step for step in numbers if type(step) is not int or step < 1]
    if odd or not numbers:
        raise ValueError(
            f"at: steps must be integers of at least 1; got {odd[0]!r}" if odd else "at: there are no steps"
        )
    chosen = frozenset(numbers)
    return observing(lambda tick: tick.state.step in chosen, lambda step: step in chosen, *observers)


@checked
def every_seconds(seconds: float, *observers: Observer | Observe, clock: Clock = time.monotonic) -> Stage:
    """Look at the first tick after every ``seconds`` seconds.

    Args:
        seconds: Between looks, counted from the start of the stream and then from the last look.
        observers: As in :func:`every`. Metrics that they want are computed at every step, since no step knows its time.
        clock: Gives seconds; injected, so that tests need not wait. Several processes look together, one tick after
            the first of them finds that it is time.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"every_seconds: seconds must be positive, got {seconds}")

    lifted = [_as_observer(observer) for observer in observers]

    def stage(steps: Steps) -> Steps:
        steps = as_steps(steps)

        def opened(demand: Demand) -> Iterator[Tick]:
            last, looks = clock(), 0
            agreed = steps.world.polled()

            def due(tick: Tick) -> bool:
                nonlocal last, looks
                now = clock()
                following = looks + 1  # asked for by number: what was asked before the last look is not asked again
                if agreed(following if now - last >= seconds else 0) != following:
                    return False
                last, looks = now, following
                return True

            return observing(due, lambda step: True, *lifted)(steps).open(demand)

        return attrs.evolve(_answering(steps, lifted), open=opened)

    return stage


def at_end(*observers: Observer | Observe) -> Stage:
    """Look at the last tick, when the stream has ended: by ``until``, by Ctrl-C, or because the data ended.

    A stream that ends by an exception has no last tick. Stages act at the end in the order in which they are written,
    too: those downstream that look there (another ``at_end``, a last save) see what these observers find. Nothing
    reacts to it any more.
    """
    lifted = [_as_observer(observer) for observer in observers]

    def look(tick: Tick) -> None:
        found: dict[str, float] = {}
        for observer in lifted:
            with contextlib.suppress(interrupt.Interrupted):
                results = observer.observe(tick) or {}
                check_found(results, tick, found)
                found |= results
                tick = attrs.evolve(tick, results={**tick.results, **found})
        tick.run.course.ended |= found
        _ended(tick, lifted)

    wants = frozenset(itertools.chain.from_iterable(observer.wants for observer in lifted))

    def stage(steps: Steps) -> Steps:
        stack = contextlib.ExitStack()

        def opened(steps: Steps) -> None:
            stack.enter_context(_all_open(steps, lifted))

        last = Observer(lambda tick: None, wants=wants, open=opened, end=look, close=stack.close)
        return _answering(observing(lambda tick: False, lambda step: True, last)(steps), lifted)

    return stage
