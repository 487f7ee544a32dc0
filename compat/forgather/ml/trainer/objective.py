"""The loss: how the model is called, and what of its outputs is minimised."""

import contextlib
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from forgather.ml.trainer.asking import accepts_loss_kwargs, returned_loss, takes, unwrapped
from forgather.ml.trainer.attributes import Attributes
from forgather.ml.trainer.counting import Count, counted_labels, predicts_next_labels, shifts_labels
from forgather.ml.trainer.loss_scaling import LossScaler
from forgather.ml.trainer.microbatches import INPUTS, ITEMS, LABELS, SHARE, WATCHED, WEIGHT, shared
from forgather.ml.trainer.model_settings import half_precision, in_float32, mixed_precision
from forgather_fn.losses import Objective, logits_of
from forgather_fn.model import evaluation_mode
from forgather_fn.random import key, seeded


class ObjectiveMixin(Attributes):
    """The part of a trainer that computes the loss."""

    _loss_shifts_labels: bool
    _predicts_next_labels: bool
    _share: float
    _in_parts: bool
    _called: bool
    _is_last: bool
    _uses_items: bool | None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model on a microbatch and find its loss. Override it for a loss of your own.

        Args:
            model: The live module.
            inputs: A microbatch, on the device. ``labels`` are taken out of it where a loss function, or label
                smoothing, needs them.
            return_outputs: Give ``(loss, outputs)``.
            num_items_in_batch: Labels that count in all microbatches of the step. A loss that divides by it is a part
                of the mean over the step; one that does not, the mean over its microbatch.

        Returns:
            The loss, a scalar; with the outputs, if asked for.
        """
        args, kwargs, labels = self._call(inputs, num_items_in_batch)
        outputs = model(*args, **kwargs)
        loss = self._loss(outputs, labels, num_items_in_batch, kwargs or args)
        return (loss, outputs) if return_outputs else loss

    def _call(self, inputs: Any, items: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Split a microbatch into what the model gets, by position and by name, and the labels that it does not get."""
        withheld = self.compute_loss_func is not None or self.label_smoother is not None
        if not isinstance(inputs, Mapping):
            given = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
            return (given[:-1], {}, given[-1]) if withheld and len(given) > 1 else (given, {}, None)
        named = dict(inputs)
        labels = named.pop("labels", None) if withheld else None
        if self.model_accepts_loss_kwargs and items is not None:
            named["num_items_in_batch"] = items
        return (), named, labels

    def _loss(self, outputs: Any, labels: Any, items: Any, inputs: Any) -> Tensor:
        function = self.compute_loss_func
        if function is not None:
            if takes(function, "num_items_in_batch"):
                loss = function(outputs, labels, num_items_in_batch=items)
            else:  # a plain loss, of logits and targets
                loss = function(logits_of(outputs), labels)
        elif self.label_smoother is not None and labels is not None:
            loss = self.label_smoother(outputs, labels, self._predicts_next_labels, items)
        else:
            loss = returned_loss(outputs, inputs)
        found: Tensor = loss if loss.dim() == 0 else loss.mean()
        return found

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run forward and backward on one microbatch, and give its part of the step's mean loss, detached.

        Override it to do otherwise; what the parameters' ``grad`` holds after all microbatches is what the optimizer
        gets.
        """
        self._enter_training(model)
        inputs = self._prepare_inputs(inputs)
        items = num_items_in_batch
        self._called = True
        if self._in_parts and self._uses_items is None and isinstance(items, Tensor) and not isinstance(items, Count):
            items = Count.of(items)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, **self._named_items(items))
        loss = loss if loss.dim() == 0 else loss.mean()
        assert isinstance(loss, Tensor)
        if not self._is_scaled(items):
            loss = shared(loss, self._share)
        self._backward(loss)
        return loss.detach()

    def _named_items(self, items: Any) -> dict[str, Any]:
        """Name the number of items for :meth:`compute_loss`, but for an override written for version 4."""
        return {"num_items_in_batch": items} if takes(self.compute_loss, "num_items_in_batch") else {}

    def _enter_training(self, model: nn.Module) -> None:
        """Put the model into training mode, and an optimizer that has modes, as those without a schedule have."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()

    def _is_scaled(self, items: Any) -> bool:
        """Tell whether a loss is a part of the step's mean already, or the mean over its microbatch."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        if self._uses_items is not None and items is not None:
            return self._uses_items
        return items is not None and (not isinstance(items, Count) or items.used)

    def _find_use_of_items(self, batch: Any, items: Tensor) -> None:
        """Find out, once, whether a compiled model uses the number of items: a graph cannot be watched.

        The uncompiled model is run on a microbatch, without gradients and in evaluation mode.
        """
        model, count = self.model, Count.of(items)
        compiled, model._compiled_call_impl = model._compiled_call_impl, None
        modes = evaluation_mode(model)
        try:
            random = seeded(key(self.args.seed, "items"), self.args.device)
            with torch.no_grad(), random, mixed_precision(model, self.args):
                self.compute_loss(model, self._prepare_inputs(batch), **self._named_items(count))
        finally:
            modes.restore()
            model._compiled_call_impl = compiled
        self._uses_items = count.used

    def _loss_scale(self) -> Tensor | None:
        """Give what float16 multiplies the loss by, where it does."""
        return None

    def _tell_last(self, is_last: bool) -> None:
        """Tell Accelerate's object, where there is one, whether the microbatch is the last one of its step."""
        self._is_last = is_last
        held = self.__dict__.get("accelerator")
        if held is not None:
            held.gradient_state._set_sync_gradients(is_last)

    def _backward(self, loss: Tensor) -> None:
        held = self.__dict__.get("accelerator")
        if held is not None:
            held.backward(loss)
        else:
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    @functools.cached_property
    def _scaler(self) -> LossScaler:
        """Scale losses for ``fp16``, by the scale that is in the state."""
        return LossScaler(lambda: self._loss_scale())

    def _prepare_input(self, data: Any) -> Any:
        """Move tensors to the device, in nested mappings and sequences, whose types stay."""
        if isinstance(data, Mapping):
            return type(data)({name: self._prepare_input(item) for name, item in data.items()})  # type: ignore[call-arg]
        if isinstance(data, tuple) and hasattr(data, "_fields"):
            return type(data)(*(self._prepare_input(item) for item in data))
        if isinstance(data, tuple | list):
            return type(data)(self._prepare_input(item) for item in data)
        return data.to(self.args.device, non_blocking=True) if isinstance(data, Tensor) else data

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Make a batch ready for the model.

        Raises:
            ValueError: It is empty.
        """
        if isinstance(inputs, Mapping) and not inputs:
            raise ValueError(
                "The batch received was empty, your model won't be able to train on it. Double-check that your "
                "training dataset contains keys expected by the model: "
                f"{','.join(getattr(self, '_signature_columns', None) or [])}."
            )
        return self._prepare_input(inputs)

    def compute_loss_context_manager(self) -> Any:
        """Give the context of forward and loss: that of :meth:`autocast_smart_context_manager`."""
        return self.autocast_smart_context_manager()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Give a context that does nothing, as in transformers: the model alone runs under autocast."""
        del cache_enabled
        return contextlib.nullcontext()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> tuple[list[Any], Any]:
        """Fetch the microbatches of one step, fewer at the end of the data, and count their items."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        return batches, self._get_num_items_in_batch(batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any = None) -> Tensor | None:
        """Count the labels that the losses of microbatches are a mean over; None where nobody asks."""
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return None
        total: Tensor | None = None
        for batch in batch_samples:
            count = counted_labels(batch, self._loss_shifts_labels)
            if count is None:
                return None
            total = count if total is None else total + count
        # A floating number of the default type, as in transformers: models divide by it.
        return None if total is None else total.to(device=device, dtype=torch.get_default_dtype())

    def _introspect_model(self) -> None:
        """Find out what the model takes and returns."""
        model = unwrapped(self.model)
        self.model_accepts_loss_kwargs = accepts_loss_kwargs(self.model)
        names = inspect.signature(type(model).forward).parameters
        answers = "QuestionAnswering" in type(model).__name__
        found = [n for n in names if "label" in n or (answers and n in ("start_positions", "end_positions"))]
        if not found and self.compute_loss_func is not None:
            found = ["labels"]
        self.label_names = found if self.args.label_names is None else list(self.args.label_names)
        self.can_return_loss = "return_loss" in names and names["return_loss"].default is True
        self._loss_shifts_labels = shifts_labels(model)
        self._predicts_next_labels = predicts_next_labels(model)
        self._signature_columns = None

    def _objective(self) -> Objective:
        """Make the loss of a plan: the trainer's, over microbatches as :func:`microbatches` makes them."""
        lowered = half_precision(self.args) is not None

        def arguments(part: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if part[WATCHED]:
                part[ITEMS] = Count.of(part[ITEMS])
            args, kwargs, part[LABELS] = self._call(part[INPUTS], part[ITEMS])
            return args, kwargs

        def total(outputs: Any, part: Any) -> Tensor:
            items = part[ITEMS]
            if not lowered:
                loss = self._loss(outputs, part[LABELS], items, part[INPUTS])
            else:  # the core computes losses under autocast, transformers does not
                with torch.autocast(self.args.device.type, enabled=False):
                    loss = self._loss(in_float32(outputs), part[LABELS], items, part[INPUTS])
            return loss if self._is_scaled(items) else shared(loss, part[SHARE])

        return Objective(
            total=total, weight=lambda part: part[WEIGHT], arguments=arguments, description="the trainer's loss"
        )
