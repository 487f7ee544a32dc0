"""Batches of several sizes: a schedule of the batch size, and where its batches begin."""

import bisect
from collections.abc import Mapping
from typing import Final, Protocol, TypeAlias

import attrs

from forgather_fn.describe import describe
from forgather_fn.signature import checked


class SizeAt(Protocol):
    """A schedule of the batch size."""

    def __call__(self, step: int, /) -> int:
        """Give the samples of a step, counted from 0: a pure function."""
        ...


BatchSize: TypeAlias = int | Mapping[int, int] | SizeAt
"""Samples in a step: always as many; from given steps on; or as a function of the step."""


@attrs.frozen
class Interval:
    """Steps in a row of one size.

    Attributes:
        step: The first.
        samples: The position at which it begins.
        size: Samples in each.
    """

    step: int
    samples: int
    size: int


@attrs.frozen(eq=False, repr=False)
class Sizes:
    """A schedule of the batch size, as positions.

    The position in the data stays a number of samples. Which step it belongs to follows from it, since each batch
    begins where those before it end: nothing but the position is needed to go on. A mapping is looked up in the
    logarithm of its length; a function is called once for every step up to the position asked for.

    Attributes:
        description: How it prints, and what a state keeps of it.
        least: Samples in the smallest batch; None if only calls would tell.
    """

    description: str
    least: int | None
    _intervals: list[Interval]
    _function: SizeAt | None = None
    _asked: list[int] = attrs.field(factory=lambda: [0, 0])
    """The first step that the function was not asked for, and the position at which it begins."""

    def at(self, position: int) -> int:
        """Give the size of the batch that begins at a position.

        Raises:
            ValueError: None begins there.
        """
        self._grow(position)
        found = self._intervals[
            bisect.bisect_right(self._intervals, position, key=lambda interval: interval.samples) - 1
        ]
        inside = (position - found.samples) % found.size
        if inside:
            raise ValueError(
                f"samples={position} lies inside a batch of batch_size={self}: step "
                f"{found.step + (position - found.samples) // found.size} begins at {position - inside} and has "
                f"{found.size} samples. Was the position reached with another batch size?"
            )
        return found.size

    def steps(self, position: int) -> int:
        """Count the batches from the start to a position, or first beyond it."""
        if position <= 0:
            return 0
        self._grow(position)
        found = self._intervals[
            bisect.bisect_left(self._intervals, position, key=lambda interval: interval.samples) - 1
        ]
        return found.step - (found.samples - position) // found.size

    def _grow(self, position: int) -> None:
        """Ask a function on, until the batch that begins at a position is known."""
        while self._function is not None and self._asked[1] <= position:
            step, begins = self._asked
            size = _checked(self._function(step), step)  # before anything is kept: if it fails, it is asked again
            if not self._intervals or self._intervals[-1].size != size:
                self._intervals.append(Interval(step, begins, size))
            self._asked[:] = step + 1, begins + size

    def __repr__(self) -> str:
        return self.description


def sizes(given: Mapping[int, int] | SizeAt) -> Sizes:
    """Read a schedule of the batch size.

    Args:
        given: From which step on there are how many samples in a step; or a function of the step.

    Raises:
        ValueError: A mapping does not begin at step 0, or a size is not an integer of at least 1.

    Example:
        >>> schedule = sizes({0: 2, 3: 4})
        >>> [schedule.at(position) for position in (0, 2, 4, 6, 10)], schedule.steps(11)
        ([2, 2, 2, 4, 4], 5)
    """
    if not isinstance(given, Mapping):
        return Sizes(describe(given), None, [], given)
    steps = sorted(given)
    if not steps or steps[0] != 0 or not all(isinstance(step, int) for step in steps):
        raise ValueError(
            f"batch_size={dict(given)!r}: expected the size of the first steps under 0, and others under the steps "
            "from which on they hold, such as {0: 32, 1000: 64}"
        )
    intervals = [Interval(0, 0, _checked(given[0], 0))]
    for step in steps[1:]:
        before = intervals[-1]
        begins = before.samples + (step - before.step) * before.size
        intervals.append(Interval(step, begins, _checked(given[step], step)))
    return Sizes(repr({step: given[step] for step in steps}), min(given.values()), intervals)


MOST: Final = 100_000
"""Sizes that a schedule of the batch size may be written out with."""


@checked
def rampup(*, start: int, stop: int, increment: int, samples: int) -> dict[int, int]:
    """Make a schedule of the batch size that grows in equal increments, each kept for equally many samples.

    It is ``--rampup-batch-size start increment samples`` of Megatron-LM: each size from the step on at which it first
    holds there.

    Args:
        start: The first batch size.
        stop: The last one.
        increment: By how much it grows at once; divides the difference.
        samples: Over how many samples it grows.

    Raises:
        ValueError: The increment does not lead from one to the other, there are more than 100 000 of them, or a number
            is too small.

    Example:
        >>> rampup(start=8, stop=24, increment=8, samples=100)
        {0: 8, 7: 16, 10: 24}
    """
    if start < 1 or increment < 1 or samples < 0 or stop < start or (stop - start) % increment:
        raise ValueError(
            f"rampup(start={start}, stop={stop}, increment={increment}, samples={samples}): expected start >= 1, "
            "samples >= 0, and an increment that divides stop - start"
        )
    increments = (stop - start) // increment
    if increments > MOST:
        raise ValueError(
            f"rampup: from {start} to {stop} by {increment} are more than {MOST:,} sizes; give a larger increment, or "
            "a function of the step: batches(..., batch_size=lambda step: ...)"
        )
    schedule, step, position = {0: start}, 0, 0
    for number in range(1, increments + 1):
        size = start + (number - 1) * increment
        # Batches of this size go on until so many samples were consumed, rounded up to whole batches.
        rest = max(-(-samples * number // increments) - position, 0)
        count = -(-rest // size)
        step, position = step + count, position + count * size
        schedule[step] = size + increment
    return schedule


def _checked(size: int, step: int) -> int:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"batch_size at step {step} is {size!r}: expected an integer of at least 1")
    return size
