"""The model on one batch, without gradients: its loss, its outputs, and the labels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from forgather.ml.trainer.nested import detached
from forgather.ml.trainer.objective import ObjectiveMixin


class PredictionMixin(ObjectiveMixin):
    """The part of a trainer that predicts a batch."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Run the model on a batch without gradients. Override it for models that predict in a way of their own.

        Returns:
            The mean loss, where there are labels; the outputs but for the loss and what is ignored, a single one by
            itself; and the labels. The last two are None if only the loss is wanted.
        """
        inputs = self._prepare_inputs(inputs)
        labels = self._labels_of(inputs)
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = list(getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])) if config else []
        loss: Tensor | None = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is not None:
                items = self._get_num_items_in_batch([inputs], self.args.device)
                found, outputs = self.compute_loss(model, inputs, return_outputs=True, **self._named_items(items))
                loss = found.detach().mean()
                ignored = [*ignore_keys, "loss"]
                logits = _values(outputs, ignored) if isinstance(outputs, Mapping) else _after_loss(outputs, loss)
            else:
                args, kwargs, _ = self._call(inputs, None)
                outputs = model(*args, **kwargs)
                logits = _values(outputs, ignore_keys) if isinstance(outputs, Mapping) else outputs
        if prediction_loss_only:
            return loss, None, None
        logits = detached(logits)
        if isinstance(logits, tuple | list) and len(logits) == 1:
            logits = logits[0]
        return loss, logits, labels

    def _labels_of(self, inputs: Any) -> Any:
        """Find the labels of a batch; None if it has not all of them and the model gives no loss without."""
        if not isinstance(inputs, Mapping):
            tuples = isinstance(inputs, tuple | list) and self.compute_loss_func is not None and len(inputs) > 1
            return detached(inputs[-1]) if tuples else None
        returns = inputs.get("return_loss")
        alone = not self.label_names and (self.can_return_loss if returns is None else returns)
        has_labels = bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)
        if not has_labels and not alone:
            return None
        labels = detached(tuple(inputs.get(name) for name in self.label_names))
        return labels[0] if len(labels) == 1 else labels


def _values(outputs: Mapping[str, Any], ignored: list[str]) -> tuple[Any, ...]:
    return tuple(value for name, value in outputs.items() if name not in ignored)


def _after_loss(outputs: Any, loss: Tensor) -> Any:
    """Take the predictions out of a tuple that begins with the loss; a tensor is all prediction."""
    if isinstance(outputs, tuple | list):
        first = outputs[0] if outputs else None
        is_loss = isinstance(first, Tensor) and first.numel() == 1 and torch.equal(first.detach().reshape(()), loss)
        return tuple(outputs[1:]) if is_loss or len(outputs) > 1 else tuple(outputs)
    return outputs
