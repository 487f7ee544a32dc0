"""What one call of ``train`` holds."""

from collections.abc import Iterator
from typing import Any

import attrs
from torch import Tensor

from forgather.ml.trainer.data import Lengths
from forgather.ml.trainer.feed import Feed
from forgather.ml.trainer.logs import Losses


@attrs.define(eq=False)
class Running:
    """What one call of ``train`` holds.

    Attributes:
        lengths: How long it is.
        feed: Its data.
        losses: Of its steps.
        resumed: The checkpoint that it goes on from, if any.
        start: When it began, in seconds.
        first_step: Updates made before it began.
        last_logged: At which step was logged last.
        ignore_keys: Outputs that evaluations leave out.
        grad_norm: Of the last step.
        learning_rate: Of the last step.
        skip: Microbatches of the first epoch that were trained on before.
        epoch: In which it begins.
        opened: The batches of that epoch, where what was trained on before had to be read to find it.
    """

    lengths: Lengths
    feed: Feed
    losses: Losses
    resumed: str | None
    start: float
    first_step: int
    last_logged: int
    ignore_keys: list[str] | None
    grad_norm: Tensor | None = None
    learning_rate: float | None = None
    skip: int = 0
    epoch: int = 0
    opened: Iterator[Any] | None = None
