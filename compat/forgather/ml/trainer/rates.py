"""The learning rate of a training: the scheduler that users see, and when it steps."""

import inspect
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from forgather.ml.trainer.attributes import Attributes


def waits_for_metrics(scheduler: Any) -> bool:
    """Tell whether a scheduler steps on the results of evaluations, and not with every update."""
    return isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"


class RateMixin(Attributes):
    """The part of a trainer that makes and steps the scheduler."""

    _created_lr_scheduler: bool

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the scheduler, where there is none yet; override it for one of your own."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        optimizer = self.optimizer if optimizer is None else optimizer
        if self.lr_scheduler_factory is not None:
            self.lr_scheduler = _called(self.lr_scheduler_factory, optimizer)
        else:
            from forgather.ml.trainer.scheduling import get_scheduler

            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
            )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_learning_rate(self) -> float:
        if waits_for_metrics(self.lr_scheduler) or not hasattr(self.lr_scheduler, "get_last_lr"):
            rate = self.optimizer.param_groups[0]["lr"]
        else:
            rate = self.lr_scheduler.get_last_lr()[0]
        return float(rate.item()) if isinstance(rate, Tensor) else rate

    def _step_scheduler(self) -> None:
        if self.lr_scheduler is not None and not waits_for_metrics(self.lr_scheduler):
            self.lr_scheduler.step()

    def _step_scheduler_on(self, metrics: dict[str, float]) -> None:
        """Step a scheduler that waits for metrics.

        Raises:
            KeyError: The metric that it waits for was not found.
        """
        if waits_for_metrics(self.lr_scheduler):
            self.lr_scheduler.step(metric_of(metrics, self.args.metric_for_best_model or "loss"))


def metric_of(metrics: dict[str, float], name: str) -> float:
    """Find a metric of an evaluation, with or without its prefix.

    Raises:
        KeyError: It is not there; what is, is named.
    """
    full = name if name.startswith("eval_") else f"eval_{name}"
    if full not in metrics:
        raise KeyError(
            f"The `metric_for_best_model` training argument is set to '{full}', which is not found in the evaluation "
            f"metrics. The available evaluation metrics are: {list(metrics)}. Consider changing the "
            "`metric_for_best_model` via the TrainingArguments."
        )
    return metrics[full]


def _called(factory: Any, optimizer: Any) -> Any:
    """Call a scheduler factory, by keyword where it wants that."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return factory(optimizer)
    named = parameters.get("optimizer")
    if named is not None and named.kind is named.KEYWORD_ONLY:
        return factory(optimizer=optimizer)
    if any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values()):
        return factory(optimizer)
    return factory(optimizer=optimizer)
