"""Where the time of a step goes: functions are timed in their places, each without what it calls."""

import contextlib
import functools
import importlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

Now = Callable[[], float]

CALLS: Final = 2000
"""So many calls of a function that does nothing tell what the stopwatch takes itself."""


@attrs.frozen
class Line:
    """A line of a profile.

    Attributes:
        what: What is done, for tables.
        places: The functions that do it, where they are looked up: ``module:name``, ``module:Class.name``; or
            ``module:function().name``, a function in the record that another makes, and ``module:function()``, one that
            it makes.
        model: Whether it is the model, its loss, or autograd: what any loop has.
    """

    what: str
    places: tuple[str, ...]
    model: bool = False


@attrs.define(eq=False)
class Stopwatch:
    """Seconds in each line since it was last emptied, without the lines inside of it, and how often it was called.

    What the stopwatch takes itself is measured before, and left out.
    """

    now: Now = time.perf_counter
    seconds: Counter[str] = attrs.field(factory=Counter)
    calls: Counter[str] = attrs.field(factory=Counter)
    _inside: list[float] = attrs.field(factory=lambda: [0.0])
    _own: float = 0.0
    _around: float = 0.0

    def timed(self, line: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Time a function under the name of a line."""
        inside, now, seconds, calls = self._inside, self.now, self.seconds, self.calls

        @functools.wraps(function, updated=())
        def run(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            began = now()
            try:
                return function(*args, **kwargs)
            finally:
                took = now() - began
                seconds[line] += took - inside.pop() - self._own
                calls[line] += 1
                inside[-1] += took + self._around

        return run

    def calibrate(self) -> None:
        """Measure what the stopwatch takes, within what it times and around it."""
        empty = self.timed("", lambda: None)
        found = []
        for _ in range(CALLS):
            self.seconds.clear()
            began = self.now()
            empty()
            found.append((self.seconds[""], self.now() - began))
        own, whole = (quartile(column) for column in zip(*found, strict=True))
        self._own, self._around = own, whole - own
        self.clear()

    @property
    def timed_inside(self) -> float:
        """Seconds in all lines since it was emptied, and what the stopwatch took around them."""
        return self._inside[0]

    def clear(self) -> None:
        """Empty it."""
        self.seconds.clear()
        self.calls.clear()
        self._inside[:] = [0.0]

    @contextlib.contextmanager
    def watching(self, lines: Sequence[Line]) -> Iterator[None]:
        """Time the functions of these lines, for the time of a block."""
        with contextlib.ExitStack() as stack:
            for line in lines:
                for place in line.places:
                    stack.enter_context(self._at(line.what, place))
            yield

    @contextlib.contextmanager
    def _at(self, line: str, place: str) -> Iterator[None]:
        module, _, path = place.partition(":")
        path, makes, field = path.partition("()")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        function = getattr(owner, name)

        def making(*args: Any, **kwargs: Any) -> Any:
            made, part = function(*args, **kwargs), field.removeprefix(".")
            return (
                attrs.evolve(made, **{part: self.timed(line, getattr(made, part))}) if part else self.timed(line, made)
            )

        setattr(owner, name, making if makes else self.timed(line, function))
        try:
            yield
        finally:
            setattr(owner, name, function)


@attrs.frozen
class Profile:
    """What the lines of a step took: microseconds and calls, by line; what none of them has is in :data:`REST`."""

    microseconds: Mapping[str, float]
    calls: Mapping[str, float]


@attrs.define(eq=False)
class Laps:
    """Steps under a stopwatch, one after the other."""

    watch: Stopwatch
    warmup: int
    _rounds: list[tuple[Counter[str], Counter[str]]] = attrs.field(factory=list)
    _began: float | None = None

    def lap(self) -> None:
        """Say that one step has ended, and the next begins."""
        now = self.watch.now()
        if self._began is not None:
            self.watch.seconds[REST] = now - self._began - self.watch.timed_inside
            self._rounds.append((self.watch.seconds.copy(), self.watch.calls.copy()))
        self.watch.clear()
        self._began = self.watch.now()

    def profile(self, lines: Sequence[Line]) -> Profile:
        """Give the lower quartile of each line: a busy machine only adds."""
        names = dict.fromkeys([*(line.what for line in lines), REST])
        rounds = self._rounds[self.warmup :]
        return Profile(
            {name: 1e6 * quartile([seconds[name] for seconds, _ in rounds]) for name in names},
            {name: sum(calls[name] for _, calls in rounds) / len(rounds) for name in names},
        )


def profiled(make: Callable[[], Callable[[], object]], lines: Sequence[Line], steps: int, warmup: int) -> Profile:
    """Take steps under a stopwatch.

    Args:
        make: Makes the function that takes a step; what it makes is under the stopwatch as well.
        lines: What is timed.
        steps: How many are counted.
        warmup: How many are taken before.
    """
    watch = Stopwatch()
    watch.calibrate()
    laps = Laps(watch, warmup)
    with watch.watching(lines):
        step = make()
        laps.lap()
        for _ in range(warmup + steps):
            step()
            laps.lap()
    return laps.profile(lines)


REST: Final = "all else: calls from one of these to the next, records, dictionaries"
"""The line of what no other line has."""


def quartile(values: Sequence[float]) -> float:
    """Give the lower quartile."""
    return sorted(values)[len(values) // 4]
