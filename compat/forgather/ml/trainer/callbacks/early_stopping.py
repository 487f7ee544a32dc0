"""Stopping when a metric no longer improves."""

import logging
from collections.abc import Mapping
from typing import Any

from forgather.ml.trainer.callbacks.base import TrainerCallback
from forgather.ml.trainer.enums import IntervalStrategy
from forgather.ml.trainer.trainer_types import ExportableState, TrainerControl, TrainerState

logger = logging.getLogger(__name__)


class EarlyStoppingCallback(TrainerCallback, ExportableState):
    """Stop when ``metric_for_best_model`` has not improved in a number of evaluations.

    Args:
        early_stopping_patience: Evaluations without an improvement after which the run stops.
        early_stopping_threshold: By how much the metric must be better to count as improved.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def check_metric_value(self, args: Any, state: TrainerState, control: TrainerControl, metric_value: float) -> None:
        """Count an evaluation that did not improve, or begin to count anew."""
        best = state.best_metric
        gain = 0.0 if best is None else (metric_value - best) * (1 if args.greater_is_better else -1)
        if best is None or (gain > 0 and gain > (self.early_stopping_threshold or 0.0)):
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse arguments under which nothing would be compared.

        Raises:
            AssertionError: As transformers' own does, whose users wait for it: no metric, or no evaluation.
        """
        if not args.load_best_model_at_end:
            logger.warning(
                "Using EarlyStoppingCallback without load_best_model_at_end=True. "
                "Once training is finished, the best model will not be loaded automatically."
            )
        if args.metric_for_best_model is None:
            raise AssertionError("EarlyStoppingCallback requires metric_for_best_model to be defined")
        if args.eval_strategy == IntervalStrategy.NO:
            raise AssertionError("EarlyStoppingCallback requires IntervalStrategy of steps or epoch")

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare with the best metric so far, and stop when patience is at its end."""
        name = "eval_" + args.metric_for_best_model.removeprefix("eval_")
        value = (metrics or {}).get(name)
        if value is None:
            logger.warning(
                "early stopping required metric_for_best_model, but did not find %s so early stopping is disabled", name
            )
            return
        self.check_metric_value(args, state, control, value)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        """Give the arguments and the count."""
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }
