"""Where the parts of a batch and of a model's outputs lie that a loss looks at."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

TARGETS = ("labels", "label", "targets", "target", "y")
"""Names under which a dict batch's target is looked for."""


def logits_of(outputs: Any) -> Tensor:
    """Find the logits: a tensor itself, ``outputs["logits"]``, ``outputs.logits``, or the first of a tuple.

    Raises:
        ValueError: There are none; what there is, is named.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif isinstance(outputs, tuple | list):
        found = next((item for item in outputs if isinstance(item, Tensor) and item.dim() > 0), None)
    else:
        found = getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        have = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(f"the model's outputs have no logits: expected a tensor or a key 'logits', got {have}")
    return found


def target_of(batch: Any) -> Tensor:
    """Find the target: the last of a tuple batch, or what a dict batch has under one of :data:`TARGETS`.

    Raises:
        ValueError: There is none; what there is, is named.
    """
    if isinstance(batch, Mapping):
        for name in TARGETS:
            if name in batch:
                target: Tensor = batch[name]
                return target
        raise ValueError(f"the batch has no target: expected one of {', '.join(TARGETS)}, got {sorted(batch)}")
    if isinstance(batch, Sequence) and len(batch) > 1:
        last: Tensor = batch[-1]
        return last
    raise ValueError(
        f"the batch has no target: expected a dict or a tuple (inputs, ..., target), got {type(batch).__name__}. "
        "Write the loss as a function of (outputs, batch) where the target lies elsewhere."
    )


def leading_dimension(data: Any) -> int:
    """Count a batch's samples: the leading dimension of its first tensor.

    Raises:
        ValueError: There is no tensor with a dimension.
    """
    pending = [data]
    while pending:
        item = pending.pop(0)
        if isinstance(item, Tensor) and item.dim() > 0:
            return item.shape[0]
        if isinstance(item, Mapping):
            pending = [*item.values(), *pending]
        elif isinstance(item, tuple | list):
            pending = [*item, *pending]
    raise ValueError(
        f"cannot count the samples of a batch without tensors: {type(data).__name__}; make tensors of arrays and lists "
        "(torch.as_tensor), or use Batch(data, samples)"
    )


def labelled(labels: Tensor) -> Tensor:
    """Count the labels that are not left out, which are those other than -100."""
    return (labels != -100).sum()
