"""Evaluation and prediction."""

import itertools
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather.ml.trainer.counting import batch_size_of, weight_of
from forgather.ml.trainer.data import DataMixin, has_length
from forgather.ml.trainer.feed import own_batches
from forgather.ml.trainer.kept import Kept, in_turn
from forgather.ml.trainer.logs import LogMixin
from forgather.ml.trainer.model_settings import mixed_precision
from forgather.ml.trainer.nested import plain_numbers
from forgather.ml.trainer.prediction import PredictionMixin
from forgather.ml.trainer.sharing import Sharing
from forgather.ml.trainer.trainer_types import EvalLoopOutput, EvalPrediction, PredictionOutput, speed_metrics
from forgather_fn.share import Share


class EvaluationMixin(PredictionMixin, DataMixin, LogMixin):
    """The part of a trainer that evaluates and predicts."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the model, log what was found, and give it.

        Args:
            eval_dataset: Instead of the trainer's; a dict of several is evaluated one after the other.
            ignore_keys: Names of outputs that are no predictions.
            metric_key_prefix: What each metric's name begins with.

        Returns:
            The loss, the mean over all labels, whatever the batch size; metrics; and how long it took.
        """
        given = eval_dataset is not None
        dataset = eval_dataset if given else self.eval_dataset
        if isinstance(dataset, dict):
            found: dict[str, float] = {}
            for name, one in dataset.items():
                found.update(
                    self.evaluate(
                        eval_dataset=one if given else name,
                        ignore_keys=ignore_keys,
                        metric_key_prefix=f"{metric_key_prefix}_{name}",
                    )
                )
            return found
        loader = self.get_eval_dataloader(dataset)
        start = time.time()
        output = self.evaluation_loop(
            loader,
            description="Evaluation",
            prediction_loss_only=True if self.compute_metrics is None else None,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        metrics = self._timed(output, metric_key_prefix, start)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Give the model's outputs on a dataset, the labels, and metrics where there are labels; nothing is logged."""
        loader = self.get_test_dataloader(test_dataset)
        start = time.time()
        output = self.evaluation_loop(
            loader, description="Prediction", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
        )
        metrics = self._timed(output, metric_key_prefix, start)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def _timed(self, output: EvalLoopOutput, prefix: str, start: float) -> dict[str, float]:
        batch_size = self.args.eval_batch_size * self.args.world_size
        metrics: dict[str, float] = output.metrics if output.metrics is not None else {}
        number = output.num_samples or 0
        metrics.update(speed_metrics(prefix, start, num_samples=number, num_steps=math.ceil(number / batch_size)))
        told: dict[str, float] = self._world.broadcast(metrics)
        return told

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run :meth:`prediction_step` over a loader, and compute metrics; what evaluate and predict share."""
        args, model = self.args, self.model
        self._world.begin("an evaluation")
        if prediction_loss_only is None:
            prediction_loss_only = args.prediction_loss_only
        prepared = self._prepare_evaluation(model)
        model.eval()  # it stays so, for callbacks and code after train() that sample; the next step calls train()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()
        kept = Kept.empty(args.eval_do_concat_batches)
        limit = getattr(args, "max_eval_steps", -1)
        batches = self._own_batches(dataloader, limit if limit > 0 else None)
        with mixed_precision(model, args):
            self._evaluate_batches(kept, batches, description, prediction_loss_only, ignore_keys)
        if self._world.size > 1:
            kept.gather(self._world)
        number = self._number_of_samples(dataloader, kept.samples if limit <= 0 else -1, kept.samples)
        predictions, labels = kept.predictions.result(), kept.labels.result()
        metrics = self._metrics(kept, predictions, labels)
        if (loss := kept.loss()) is not None:
            metrics[f"{metric_key_prefix}_loss"] = loss
        if prepared is not None:
            metrics[f"{metric_key_prefix}_model_preparation_time"] = prepared
        for name in list(metrics):
            if not name.startswith(f"{metric_key_prefix}_"):
                metrics[f"{metric_key_prefix}_{name}"] = metrics.pop(name)
        return EvalLoopOutput(predictions=predictions, label_ids=labels, metrics=metrics, num_samples=number)

    def _own_batches(self, dataloader: Any, limit: int | None) -> Any:
        """Give the batches of an evaluation that this process has: each of them is one process's."""
        sharing = self._sharing()
        if sharing is None:
            self.callback_handler.eval_dataloader = dataloader
            return itertools.islice(dataloader, limit)
        rounds = Sharing(
            sharing.world, Share(sharing.world.size, sharing.world.rank, sharing.world.size), sharing.dispatch
        )
        self.callback_handler.eval_dataloader, batches = own_batches(dataloader, self.args.seed, rounds, limit)
        return batches

    def _sharing(self) -> Sharing | None:
        """Say how the batches of training are shared out; None where that is not asked."""
        return None

    model_preparation_time: float
    _prepared: bool

    def _prepare_evaluation(self, model: nn.Module) -> float | None:
        """Place the model, and give how long it took where no training has done so."""
        full = {"fp16_full_eval": torch.float16, "bf16_full_eval": torch.bfloat16}
        dtype = next((kind for name, kind in full.items() if getattr(self.args, name, False)), None)
        start = time.time()
        if not self.is_in_train and (dtype is not None or self.place_model_on_device):
            model.to(device=self.args.device, dtype=dtype)
        if not self._prepared:
            self._prepared = True
            self.model_preparation_time = round(time.time() - start, 4)
        return getattr(self, "model_preparation_time", None)

    def _evaluate_batches(
        self, kept: Kept, batches: Any, description: str, loss_only: bool, ignore_keys: list[str] | None
    ) -> None:
        args = self.args
        whole = not args.batch_eval_metrics or description == "Prediction"
        evaluated = (self._evaluate_batch(kept, inputs, whole, loss_only, ignore_keys) for inputs in batches)
        if args.batch_eval_metrics:
            for prediction, is_last in _with_last(in_turn(self._world, evaluated)):
                if prediction is not None and self.compute_metrics is not None:
                    kept.metrics = self.compute_metrics(prediction, compute_result=is_last)
            return
        for step, _ in enumerate(evaluated, 1):
            if args.eval_accumulation_steps and step % args.eval_accumulation_steps == 0:
                for held in (kept.losses, kept.predictions, kept.labels, kept.inputs):
                    held.to_numpy()

    def _evaluate_batch(
        self, kept: Kept, inputs: Any, whole: bool, loss_only: bool, ignore_keys: list[str] | None
    ) -> EvalPrediction | None:
        """Run the model on a batch, keep what is kept of it, and give what metrics of it alone are computed of."""
        args, size = self.args, batch_size_of(inputs)
        kept.samples += size or 0
        # Before the step: an override may take the labels out.
        weight = weight_of(inputs, self._loss_shifts_labels)
        loss, logits, labels = self.prediction_step(self.model, inputs, loss_only, ignore_keys=ignore_keys)
        wanted = self._main_input(inputs) if "inputs" in args.include_for_metrics else None
        if loss is not None:
            self._add_loss(kept, loss, weight, size or 1)
        if logits is not None and self.preprocess_logits_for_metrics is not None:
            logits = self.preprocess_logits_for_metrics(logits, labels)
        for held, nest in ((kept.inputs, wanted), (kept.predictions, logits), (kept.labels, labels)):
            if nest is not None and whole:
                held.add(nest)
        self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        if not args.batch_eval_metrics or logits is None or labels is None:
            return None
        losses = loss.repeat(size or 1) if loss is not None and "loss" in args.include_for_metrics else None
        inputs = inputs if "inputs" in args.include_for_metrics else None
        return EvalPrediction(predictions=logits, label_ids=labels, inputs=inputs, losses=losses)

    def _add_loss(self, kept: Kept, loss: Tensor, weight: float, size: int) -> None:
        loss = loss.detach().mean()
        if "loss" in self.args.include_for_metrics:
            kept.losses.add(loss.repeat(size))
        loss = loss.double() if loss.device.type != "mps" else loss
        if weight == 0 or (self._filters_nonfinite() and not math.isfinite(float(loss))):
            kept.means.append(ff.Mean(torch.zeros_like(loss), 0.0))  # where all are so, their mean is nan
            return
        kept.means.append(ff.Mean(loss * weight, weight))

    def _filters_nonfinite(self) -> bool:
        """Tell whether values that are not finite are left out of means: only where training goes on."""
        return self.args.on_nonfinite == "skip" and bool(self.args.logging_nan_inf_filter)

    def _main_input(self, inputs: Any) -> Any:
        return self._prepare_input(inputs[getattr(self.model, "main_input_name", "input_ids")])

    def _metrics(self, kept: Kept, predictions: Any, labels: Any) -> dict[str, Any]:
        found: Mapping[str, Any] = kept.metrics or {}
        wanted, both = self.args.include_for_metrics, predictions is not None and labels is not None
        if self.compute_metrics is not None and not self.args.batch_eval_metrics and both:
            found = self.compute_metrics(
                EvalPrediction(
                    predictions=predictions,
                    label_ids=labels,
                    losses=kept.losses.result() if "loss" in wanted else None,
                    inputs=kept.inputs.result() if "inputs" in wanted else None,
                )
            )
        if found is None or not isinstance(found, Mapping):
            raise ValueError(f"compute_metrics must return a dict of named numbers, got {type(found).__name__}")
        return dict(plain_numbers(dict(found)))

    def _number_of_samples(self, dataloader: Any, seen: int, counted: int) -> int:
        dataset = getattr(dataloader, "dataset", None)
        if seen >= 0 and dataset is not None and has_length(dataset) and len(dataset):
            return len(dataset)
        return counted


def _with_last(batches: Any) -> Any:
    """Give each item with whether it is the last one."""
    iterator = iter(batches)
    try:
        held = next(iterator)
    except StopIteration:
        return
    for item in iterator:
        yield held, False
        held = item
    yield held, True
