"""A detector of spikes."""

import math
import statistics
from typing import Final

from forgather_fn.describe import described
from forgather_fn.reducers.base import Kept, Reducer

NORMAL: Final = 1.4826
"""How much larger a normal standard deviation is than the median distance from the median."""

FLOOR: Final = 1e-6
"""Of the median: the least spread, where all numbers are alike."""


@described
def spikes(*, threshold: float = 6.0, window: int = 64, least: int = 16) -> Reducer:
    """Say 1 where the newest number lies far above those before it, or is not finite; else 0.

    A number is a spike if it is above ``median + threshold * 1.4826 * MAD`` of the window before it, where the MAD is
    the median distance from the median. Unlike a mean and a standard deviation, they are not moved by the spikes
    themselves; and where numbers stay high, it is no spike any more when half of the window has seen them.

    Source: Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993 (the modified z-score).

    Args:
        threshold: In robust standard deviations.
        window: How many finite numbers are remembered.
        least: How many there must be before any of them can be a spike.

    Raises:
        ValueError: ``threshold`` is not positive, or ``least`` not from 2 to ``window``.

    Example:
        >>> detector = spikes(window=4, least=3)
        >>> kept = detector.init()
        >>> for loss in (1.0, 1.1, 0.9, 8.0):
        ...     kept = detector.add(kept, loss)
        >>> detector.result(kept)
        1.0
    """
    if not (math.isfinite(threshold) and threshold > 0) or not 2 <= least <= window:
        raise ValueError(
            "spikes: expected threshold > 0 and 2 <= least <= window; "
            f"got threshold={threshold}, least={least}, window={window}"
        )

    def add(kept: Kept, number: float) -> Kept:
        before: tuple[float, ...] = kept["window"]
        if not math.isfinite(number):
            return {"window": before, "spike": 1.0}
        high = len(before) >= least and number > _bound(before, threshold)
        return {"window": (*before, number)[-window:], "spike": float(high)}

    return Reducer(lambda: {"window": (), "spike": 0.0}, add, lambda kept: kept["spike"])


def _bound(numbers: tuple[float, ...], threshold: float) -> float:
    middle = statistics.median(numbers)
    spread = NORMAL * statistics.median(abs(number - middle) for number in numbers)
    return middle + threshold * max(spread, FLOOR * abs(middle))
