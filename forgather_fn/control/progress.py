"""How far a run is, and how fast it goes: what is known on the host without asking the device."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import attrs

MARKS: Final = 30
"""Over how many seconds rates are means, about."""


@attrs.frozen
class Numbers:
    """What a look at the metrics of one step found.

    Attributes:
        step: Which step.
        time: When, by the inbox's clock.
        values: Metrics by name: ``loss``, ``learning_rate``, ...
    """

    step: int
    time: float
    values: Mapping[str, float]


@attrs.define(eq=False)
class Progress:
    """Where a run is; the loop advances it, others read it.

    Attributes:
        started: The step at which this attempt began.
        horizon: The step at which the run ends, if known.
        epoch_of: Passes over the data, from samples, where its length is known.
        at: Steps made, samples consumed, and when that was; all of one step, for whoever reads them.
    """

    started: int
    horizon: int | None
    epoch_of: Callable[[int], float | None]
    at: tuple[int, int, float]
    _marks: deque[tuple[int, int, float]] = attrs.field(factory=lambda: deque(maxlen=MARKS))

    def advance(self, step: int, samples: int, now: float) -> None:
        """Note a step."""
        self.at = at = step, samples, now
        if not self._marks or now - self._marks[-1][2] >= 1.0:
            self._marks.append(at)

    @property
    def step(self) -> int:
        """Steps made."""
        return self.at[0]

    @property
    def epoch(self) -> float | None:
        """Passes over the data so far."""
        return self.epoch_of(self.at[1])

    @property
    def rates(self) -> tuple[float, float] | None:
        """Steps and samples a second, over the last half minute or so; None before the second step."""
        at, first = self.at, self._marks[0] if self._marks else self.at
        seconds = at[2] - first[2]
        return ((at[0] - first[0]) / seconds, (at[1] - first[1]) / seconds) if seconds > 0 else None

    @property
    def remaining(self) -> float | None:
        """Seconds to the end, at the present pace; None where either is not known."""
        rates = self.rates
        if self.horizon is None or rates is None or not rates[0]:
            return None
        return max(self.horizon - self.step, 0) / rates[0]
