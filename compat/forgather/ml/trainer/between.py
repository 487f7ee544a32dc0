"""Between two steps: logs, evaluations and saves, as callbacks asked for them."""

import logging
from typing import Any

import torch
from torch import Tensor

from forgather.ml.trainer.agreeing import AgreeingMixin
from forgather.ml.trainer.data import DataMixin
from forgather.ml.trainer.evaluation import EvaluationMixin
from forgather.ml.trainer.rates import RateMixin, metric_of
from forgather.ml.trainer.resuming import ResumingMixin
from forgather.ml.trainer.running import Running

logger = logging.getLogger(__name__)


class BetweenMixin(EvaluationMixin, ResumingMixin, RateMixin, AgreeingMixin):
    """The part of a trainer that does what callbacks asked for."""

    def _look_up(self, run: Running, epoch: int) -> None:
        """Do what callbacks asked for."""
        self._agree()
        tr_loss = None
        if type(self)._maybe_log_save_evaluate is not BetweenMixin._maybe_log_save_evaluate:
            tr_loss = torch.tensor(run.losses.sum_since())
        self._maybe_log_save_evaluate(
            tr_loss, run.grad_norm, self.model, None, epoch, run.ignore_keys, run.start, learning_rate=run.learning_rate
        )

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor | None,
        grad_norm: Tensor | float | None,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Log, evaluate and save, as far as callbacks asked for it.

        Args:
            tr_loss: The sum of the losses since the last log; made for overrides, and not read here.
            grad_norm: Of the last step, before clipping.
            model: The live module.
            trial: None.
            epoch: The number of the pass over the data.
            ignore_keys_for_eval: Names of outputs that are no predictions.
            start_time: Of the training, in seconds.
            learning_rate: Of the last step.
        """
        del tr_loss, model, epoch
        run = self._run
        assert run is not None
        if self.control.should_log and self.state.global_step > run.last_logged:
            steps = self.state.global_step - run.last_logged
            logs: dict[str, float] = {"loss": run.losses.drained() / steps}
            if grad_norm is not None:
                logs["grad_norm"] = float(grad_norm)
            logs["learning_rate"] = learning_rate if learning_rate is not None else self._get_learning_rate()
            run.last_logged = self.state.global_step
            self.store_flos()
            self.log(logs, start_time)
            self._agree()
        if self.control.should_save and getattr(self.args, "eval_on_save", False) and self.eval_dataset is not None:
            self.control.should_evaluate = True
        if self.control.should_evaluate and not self._is_asked_in_vain():
            metrics = self._evaluate(trial, ignore_keys_for_eval)
            is_best = self._determine_best_metric(metrics, trial)
            if str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) == "best":
                self.control.should_save = is_best
            self._agree()
        if self.control.should_save:
            self._commit_checkpoint()
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self._agree()

    _run: Running | None

    def _is_asked_in_vain(self) -> bool:
        """Tell whether an evaluation was asked for from outside, by ``forgather control``, and nothing is there for it.

        It is for a callback to know what it asks for; who asks from outside cannot know, and must not end the training.
        """
        if not any(getattr(callback, "asked_to_evaluate", False) for callback in self.callback_handler.callbacks):
            return False
        named = {"evaluate": EvaluationMixin.evaluate, "get_eval_dataloader": DataMixin.get_eval_dataloader}
        own = any(getattr(type(self), name) is not one or name in self.__dict__ for name, one in named.items())
        if own or self.eval_dataset is not None:
            return False
        logger.warning("step %d: asked to evaluate, but there is no eval_dataset", self.state.global_step)
        self.control.should_evaluate = False
        return True

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluate in a training, and step a scheduler that waits for metrics."""
        del trial
        try:
            metrics = self.evaluate(ignore_keys=ignore_keys_for_eval)
        except (RuntimeError, MemoryError) as error:
            if self.args.auto_find_batch_size and out_of_memory(error):
                raise ValueError(
                    "Evaluation hit an out-of-memory error. `auto_find_batch_size` only adjusts the training batch "
                    "size, reduce `per_device_eval_batch_size` instead."
                ) from error
            raise
        agreed: dict[str, float] = self._world.broadcast(metrics)  # an override may find others on each process
        if not skip_scheduler:
            self._step_scheduler_on(agreed)
        return agreed

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any = None) -> bool:
        """Compare an evaluation with the best before, and tell whether it is better; nan never is."""
        if self.args.metric_for_best_model is None:
            return False
        value, best = metric_of(metrics, self.args.metric_for_best_model), self.state.best_metric
        greater = self.args.greater_is_better
        if best is None:
            best = float("-inf") if greater else float("inf")
            self.state.best_metric = best
        if not (value > best if greater else value < best):
            return False
        self.state.best_metric = value
        if str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no":
            self.state.best_global_step = self.state.global_step
        return True


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out."""
    known = ("CUDA out of memory.", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in known)
