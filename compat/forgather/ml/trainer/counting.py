"""How much a batch weighs: the number of its labels, or of its samples."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def batch_size_of(inputs: Any) -> int | None:
    """Find the leading dimension of the first tensor that has one, in nested mappings and sequences."""
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, list | tuple):
        return next((size for item in inputs if (size := batch_size_of(item)) is not None), None)
    shape: Any = getattr(inputs, "shape", ())
    return int(shape[0]) if len(shape) else None


def counted_labels(inputs: Any, shifts: bool) -> Tensor | None:
    """Count the labels that a loss is a mean over: those that are not -100; None where there are none to count.

    Args:
        inputs: A collated batch.
        shifts: Whether the model's loss leaves out the first label of each row, as causal language models do.
    """
    if not isinstance(inputs, Mapping) or "labels" not in inputs:
        return None
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"]
    if not isinstance(labels, Tensor):
        return None
    if shifts and "shift_labels" not in inputs:
        labels = labels[..., 1:]
    return labels.ne(-100).sum()


def weight_of(inputs: Any, shifts: bool) -> float:
    """Weigh a batch: its labels, where they can be counted, else its samples."""
    counted = counted_labels(inputs, shifts)
    if counted is not None:
        return float(counted)
    return float(batch_size_of(inputs) or 1)


def shifts_labels(model: nn.Module) -> bool:
    """Tell whether a model's own loss is that of causal language models, which leaves out each row's first label."""
    module = sys.modules.get("transformers.loss.loss_utils")  # a model of transformers has loaded it
    kind = getattr(model, "loss_type", None)
    if module is None or kind is None:
        return False
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return module.LOSS_MAPPING.get(kind) is module.ForCausalLMLoss and not encoder_decoder


def predicts_next_labels(model: nn.Module) -> bool:
    """Tell whether a model's outputs at a label are a prediction of the next one, so that smoothing has to shift them.

    They are where its own loss shifts labels, and where transformers lists its class, or one that it is made of, among
    causal language models: ``GPT2LMHeadModel`` and seven others name no kind of loss.
    """
    module = sys.modules.get("transformers.models.auto.modeling_auto")  # a model of transformers has loaded it
    listed = set() if module is None else set(module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return shifts_labels(model) or any(kind.__name__ in listed for kind in type(model).__mro__)


class Count(Tensor):
    """A number of items that knows whether it was used.

    A model that takes ``num_items_in_batch`` and ignores it returns the mean over its microbatch; one that uses it, a
    part of the mean over the whole step. Nothing but its use tells them apart.
    """

    used: bool

    @staticmethod
    def of(value: Tensor) -> "Count":
        """Watch a scalar."""
        count = value.detach().clone().as_subclass(Count)
        count.used = False
        return count

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the use, and compute with an ordinary tensor."""
        del types
        reads = getattr(func, "__name__", "") not in _LOOKS
        plain = torch.utils._pytree.tree_map(lambda item: _plain(item, reads), (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*plain[0], **plain[1])


_LOOKS = frozenset({"__get__", "dim", "size", "is_floating_point", "requires_grad_", "__repr__"})
"""What may be asked of a tensor without its value mattering."""


def _plain(item: Any, reads: bool) -> Any:
    if not isinstance(item, Count):
        return item
    if reads:
        item.used = True
    return item.as_subclass(Tensor)
