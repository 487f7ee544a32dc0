"""The microbatches of a step: what the loss of a plan reads of each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from forgather.ml.trainer.windows import Window
from forgather_fn.losses import logits_of

INPUTS, ITEMS, SHARE, WEIGHT, WATCHED, LABELS = "inputs", "items", "share", "weight", "watched", "labels"
"""What a microbatch is made of: the inputs of the model; the number of items of the whole step, as models are given it;
its share of the step, by which a mean over it alone is multiplied; what it adds to the weight of the step, which is 1;
whether the use of the number is watched; and the labels, once taken out."""


def microbatches(window: Window, watch: bool) -> list[dict[str, Any]]:
    """Make what :meth:`ObjectiveMixin._objective` reads of the microbatches of one step that this process has.

    Args:
        window: The microbatches.
        watch: Whether it is to be found out if models use the number of items.
    """
    items = divisor(window.items)
    watched = watch and window.count > 1 and isinstance(items, Tensor)
    return [
        {
            INPUTS: inputs,
            ITEMS: items,
            SHARE: window.share(weight),
            WEIGHT: 0.0 if number else 1.0,
            WATCHED: watched,
            LABELS: None,
        }
        for number, (inputs, weight) in enumerate(zip(window.batches, window.weights, strict=True), window.first)
    ]


def divisor(items: Any) -> Any:
    """Give the number of items of a step as models are given it, which divide by it: 1 where there are none."""
    return items.clamp(min=1) if isinstance(items, Tensor) else items


def shared(loss: Tensor, share: float) -> Tensor:
    """Take a microbatch's part of the mean over the step. A mean over nothing is nan, and counts for nothing."""
    if share == 1.0:
        return loss
    return loss * share if share else torch.where(torch.isfinite(loss), loss, 0.0) * 0.0


def smoother(epsilon: float) -> Callable[..., Tensor]:
    """Make the function that smooths labels, in the form that transformers calls it."""

    def smoothed(outputs: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None) -> Tensor:
        logits = logits_of(outputs)
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        rows = logits.reshape(-1, logits.shape[-1])
        total = F.cross_entropy(rows, labels.reshape(-1), reduction="sum", label_smoothing=epsilon)
        return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    return smoothed
