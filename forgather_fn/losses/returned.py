"""The loss that a model computes itself."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.losses.base import Objective
from forgather_fn.losses.finding import labelled, leading_dimension, target_of

WEIGHTS: Mapping[str, Callable[[Any], Tensor | float]] = {
    "samples": lambda batch: leading_dimension(batch),
    "tokens": lambda batch: labelled(target_of(batch)),
    "next_tokens": lambda batch: labelled(target_of(batch)[..., 1:]),
}
"""What a model's own loss may be a mean over, by name: the weight of a batch."""


@described
def from_output(*, weight: str | Callable[[Any], Tensor | float]) -> Objective:
    """Take the mean loss that the model itself returns: ``outputs.loss``, ``outputs["loss"]``, or the first of a tuple.

    A mean says nothing of its weight, and without it microbatches and evaluation batches could only be averaged, which
    is wrong where they are ragged. So the weight must be named.

    A microbatch without anything to weigh counts for nothing, if the model's loss of it has a finite gradient: a mean
    over nothing, ``total / count``, has none; ``total / count.clamp(min=1)`` has.

    Args:
        weight: What the model's loss is a mean over: ``"samples"``, ``"tokens"`` (labels that are not -100),
            ``"next_tokens"`` (the same, but the first of each row, as causal language models shift), or a function of
            the batch. Hugging Face models that take it get it as ``num_items_in_batch``.

    Raises:
        ValueError: The weight is not one of these.
    """
    if isinstance(weight, str) and weight not in WEIGHTS:
        raise ValueError(
            f"from_output: weight={weight!r} is not one of {sorted(WEIGHTS)} and not a function of the batch"
        )
    count = WEIGHTS[weight] if isinstance(weight, str) else weight

    def total(outputs: Any, batch: Any) -> Tensor:
        mean, number = _loss_of(outputs), torch.as_tensor(count(batch))
        # A mean over nothing is nan; as a part of a larger batch it counts for nothing.
        return torch.where(number.to(mean.device) > 0, mean, 0.0) * number.to(mean.device)

    return Objective(total=total, weight=count, passes_weight=True)


def _loss_of(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        found: Any = outputs
    elif isinstance(outputs, Mapping):
        found = outputs.get("loss")
    else:
        found = outputs[0] if isinstance(outputs, tuple | list) and outputs else getattr(outputs, "loss", None)
    if not isinstance(found, Tensor) or found.dim() != 0:
        raise ValueError(
            f"from_output: the model returned no scalar loss, but {type(found).__name__}; "
            "Hugging Face models return one only if the batch has labels"
        )
    return found
