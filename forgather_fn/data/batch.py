"""What one step consumes."""

from typing import Any

import attrs

from forgather_fn.data.fetch import Indices


@attrs.frozen(eq=False)
class Batch:
    """What one step consumes.

    Attributes:
        data: What the model and the loss get.
        samples: How many samples are in it.
        indices: Their indices in the dataset, int64, shape (samples,), so that a step can be replayed; None if unknown.
        ragged: Whether it is smaller than the stream's batch size, because an epoch or the stream ended.
        varies: Whether its stream has batches of different sizes, so that a compiler does not count on this one's.
        cursor: Where its source goes on after it, if a number of samples does not say it; the next state keeps it.
    """

    data: Any
    samples: int
    indices: Indices | None
    ragged: bool = False
    varies: bool = False
    cursor: str | None = None
