"""Stopping when the loss runs away."""

import logging
import math
from typing import Any

from forgather.ml.trainer.callbacks.base import Logs, TrainerCallback
from forgather.ml.trainer.trainer_types import ExportableState, TrainerControl, TrainerState

logger = logging.getLogger(__name__)

ACTIONS = ("stop", "abort")


class DivergenceDetector(TrainerCallback, ExportableState):
    """Stop when a short running mean of the loss is above a long one by a threshold, or the loss is not finite.

    Args:
        short_alpha: The share that a new value has in the short mean.
        long_alpha: The share that it has in the long mean; less than ``short_alpha``.
        threshold: By how much the short mean must be above the long one.
        action: ``"stop"`` saves and stops, ``"abort"`` stops without saving what diverged.
        metric_key: What is looked at: a key of the logs, such as ``"loss"`` or ``"eval_loss"``.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        short_alpha: float = 0.5,
        long_alpha: float = 0.05,
        threshold: float = 2.0,
        action: str = "stop",
        metric_key: str = "loss",
    ) -> None:
        if not 0 < long_alpha < short_alpha <= 1:
            raise ValueError(
                f"short_alpha={short_alpha!r}, long_alpha={long_alpha!r}: expected 0 < long_alpha < short_alpha <= 1"
            )
        if action not in ACTIONS:
            raise ValueError(f"action={action!r} is not one of {', '.join(map(repr, ACTIONS))}")
        self.short_alpha, self.long_alpha = short_alpha, long_alpha
        self.threshold, self.action, self.metric_key = threshold, action, metric_key
        self.short_mean: float | None = None
        self.long_mean: float | None = None
        self.diverged_at: int | None = None

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Logs = None, **kwargs: Any) -> None:
        """Look at a logged value."""
        value = (logs or {}).get(self.metric_key)
        if value is None or not self._diverged(float(value)):
            return
        logger.warning(
            "step %d: %s=%s: diverged (short mean %s, long mean %s)",
            *(state.global_step, self.metric_key, value, self.short_mean, self.long_mean),
        )
        self.diverged_at = state.global_step
        control.should_training_stop = True
        control.should_save = self.action == "stop"

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save nothing at the end of the epoch that an abort ends."""
        if self.action == "abort" and self.diverged_at == state.global_step:
            control.should_save = False

    def _diverged(self, value: float) -> bool:
        if not math.isfinite(value):
            return True
        if self.short_mean is None or self.long_mean is None:
            self.short_mean = self.long_mean = value
        self.short_mean += self.short_alpha * (value - self.short_mean)
        self.long_mean += self.long_alpha * (value - self.long_mean)
        return self.short_mean - self.long_mean >= self.threshold

    def state(self) -> dict[str, Any]:
        """Give the arguments and the means."""
        names = ("short_alpha", "long_alpha", "threshold", "action", "metric_key")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {name: getattr(self, name) for name in ("short_mean", "long_mean", "diverged_at")},
        }
