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
        at: Steps made, and samples consumed; of one step, for whoever reads both.
        rate_steps: Steps a second, over the last half minute or so; None before there is a mean.
        rate_samples: Samples a second, likewise.
    """

    started: int
    horizon: int | None
    epoch_of: Callable[[int], float | None]
    at: tuple[int, int]
    rate_steps: float | None = None
    rate_samples: float | None = None
    _marks: deque[tuple[float, int, int]] = attrs.field(factory=lambda: deque(maxlen=MARKS))

    def advance(self, step: int, samples: int, now: float) -> None:
        """Note a step. Rates are brought up to date once a second, and early on at each step."""
        self.at = step, samples
        marks = self._marks
        if not marks or now - marks[-1][0] >= 1.0:
            marks.append((now, step, samples))
        first = marks[0]
        if now > first[0]:
            elapsed = now - first[0]
            self.rate_steps = (step - first[1]) / elapsed
            self.rate_samples = (samples - first[2]) / elapsed

    @property
    def step(self) -> int:
        """Steps made."""
        return self.at[0]

    @property
    def epoch(self) -> float | None:
        """Passes over the data so far."""
        return self.epoch_of(self.at[1])

    @property
    def remaining(self) -> float | None:
        """Seconds to the end, at the present pace; None where either is not known."""
        if self.horizon is None or not self.rate_steps:
            return None
        return max(self.horizon - self.step, 0) / self.rate_steps
