"""Objectives: functions of (outputs, batch) that give a sum and its weight."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from forgather_fn.describe import describe, described
from forgather_fn.mean import Mean

TARGETS = ("labels", "label", "targets", "target", "y")
"""Names under which a dict batch's target is looked for."""

RESERVED = ("grad_norm", "learning_rate", "loss_scale")
"""Metrics that every step reports."""


Arguments = Callable[[Any], tuple[Sequence[Any], dict[str, Any]]]
"""How a model is called on a batch: ``batch -> (positional arguments, keyword arguments)``."""


class Loss(Protocol):
    """What a plan minimises: any function of the model's outputs and the batch.

    It returns a :class:`~forgather_fn.mean.Mean`, or a mapping of named ones of which ``"loss"`` is minimised and the
    others are reported. The weight of the objective must be a function of the batch alone; a loss that can give it
    before the forward pass is an :class:`Objective`.
    """

    def __call__(self, outputs: Any, batch: Any, /) -> Mean | Mapping[str, Mean]:
        """Give the sum of the losses of a (micro)batch, and how many it is a sum over."""
        ...


@attrs.frozen(repr=False)
class Objective:
    """A loss whose weight is known from the batch, before the forward pass.

    Attributes:
        total: ``(outputs, batch) -> scalar tensor``, the sum of the losses.
        weight: ``batch -> scalar tensor or number``, what it is a sum over.
        withheld: Keys of a dict batch that are for the loss alone and not passed to the model.
        passes_weight: Whether models of Hugging Face are given the weight as ``num_items_in_batch``.
        description: How it prints.
        arguments: ``batch -> (positional, keyword)``: how the model is called, where the loss knows better than the
            batch's form tells.
    """

    total: Callable[[Any, Any], Tensor]
    weight: Callable[[Any], Tensor | float]
    withheld: tuple[str, ...] = ()
    passes_weight: bool = False
    description: str = ""
    arguments: Arguments | None = None

    def __call__(self, outputs: Any, batch: Any) -> Mean:
        """Give the sum of the losses and its weight."""
        return Mean(self.total(outputs, batch), self.weight(batch))

    def __repr__(self) -> str:
        return self.description or f"Objective({describe(self.total)})"


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


def _labelled(labels: Tensor) -> Tensor:
    return (labels != -100).sum()


def _causal_lm_total(outputs: Any, batch: Any) -> Tensor:
    logits, labels = logits_of(outputs), target_of(batch)
    shifted = logits[..., :-1, :].reshape(-1, logits.shape[-1])
    return F.cross_entropy(
        shifted.float() if shifted.dtype.itemsize < 4 else shifted, labels[..., 1:].reshape(-1), reduction="sum"
    )


def _cross_entropy_total(outputs: Any, batch: Any) -> Tensor:
    logits, target = logits_of(outputs), target_of(batch)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    if target.is_floating_point():
        return F.cross_entropy(logits, target, reduction="sum")
    if logits.dim() == target.dim() + 1 and logits.dim() > 2 and logits.shape[:-1] == target.shape:
        logits, target = logits.flatten(0, -2), target.flatten()
    return F.cross_entropy(logits, target, reduction="sum")


def _class_weight(batch: Any) -> Tensor | float:
    target = target_of(batch)
    return target.numel() // target.shape[1] if target.is_floating_point() else _labelled(target)


def _mse_total(outputs: Any, batch: Any) -> Tensor:
    prediction, target = logits_of(outputs), target_of(batch)
    if prediction.shape != target.shape:
        raise ValueError(
            f"mse: the prediction's shape {tuple(prediction.shape)} is not the target's {tuple(target.shape)}; "
            "reshape one of them, for example the target with unsqueeze(-1)"
        )
    if prediction.dtype.itemsize < 4:
        prediction, target = prediction.float(), target.float()
    return F.mse_loss(prediction, target, reduction="sum")


causal_lm = Objective(
    total=_causal_lm_total,
    weight=lambda batch: _labelled(target_of(batch)[..., 1:]),
    withheld=TARGETS,
    description="causal_lm",
)
"""Next-token cross-entropy: logits ``[batch, time, words]`` against labels ``[batch, time]`` shifted by one; -100 is
left out, of the sum and of the weight."""

cross_entropy = Objective(
    total=_cross_entropy_total, weight=_class_weight, withheld=TARGETS, description="cross_entropy"
)
"""Classification: logits ``[batch, classes]`` (or ``[batch, ..., classes]``, or torch's ``[batch, classes, ...]``)
against class indices, -100 left out, or against class probabilities."""

mse = Objective(total=_mse_total, weight=lambda batch: target_of(batch).numel(), withheld=TARGETS, description="mse")
"""Squared error, a mean over all elements of the target."""


WEIGHTS: Mapping[str, Callable[[Any], Tensor | float]] = {
    "samples": lambda batch: leading_dimension(batch),
    "tokens": lambda batch: _labelled(target_of(batch)),
    "next_tokens": lambda batch: _labelled(target_of(batch)[..., 1:]),
}


@described
def from_output(*, weight: str | Callable[[Any], Tensor | float]) -> Objective:
    """Take the mean loss that the model itself returns: ``outputs.loss``, ``outputs["loss"]``, or the first of a tuple.

    A mean says nothing of its weight, and without it microbatches and evaluation batches could only be averaged, which
    is wrong where they are ragged. So the weight must be named.

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
        f"cannot count the samples of a batch without tensors: {type(data).__name__}; use Batch(data, samples)"
    )


def named_means(result: Any) -> dict[str, Mean]:
    """Read what a loss returned: one mean is the objective, a mapping must name it ``"loss"``.

    Raises:
        ValueError: It is not a mean or a mapping of means, the objective is not a differentiable scalar, or the
            objective's weight depends on the model.
    """
    means = dict(result) if isinstance(result, Mapping) else {"loss": result}
    for name, mean in means.items():
        if not isinstance(mean, Mean):
            given = f"a tensor of shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
            raise ValueError(
                f"the loss returned {given} for {name!r}; expected a Mean(total, weight), so that parts of a batch can "
                "be added. Return Mean(losses.sum(), losses.numel()), or use losses.from_output(weight=...)."
            )
        if not isinstance(mean.total, Tensor):
            raise ValueError(f"{name!r}: the total of a Mean must be a scalar tensor, got {mean.total!r}")
        if mean.total.dim() != 0:
            raise ValueError(f"{name!r}: the total of a Mean must be a scalar, got shape {tuple(mean.total.shape)}")
    if len(means) > 1 and any(name in means for name in RESERVED):
        raise ValueError(
            f"the loss named a mean {sorted(means.keys() & set(RESERVED))}, which a step reports itself; rename it"
        )
    if "loss" not in means:
        raise ValueError(f"the loss returned {sorted(means)}; the objective must be named 'loss'")
    weight = means["loss"].weight
    if not isinstance(weight, Tensor):
        if not isinstance(weight, Real) or not float(weight) >= 0:
            raise ValueError(
                f"the weight of the objective must be a number of at least 0, or a scalar tensor: {weight!r}"
            )
    elif weight.dim() != 0:
        raise ValueError(f"the weight of the objective must be a scalar, got shape {tuple(weight.shape)}; sum it up")
    elif weight.requires_grad:
        raise ValueError("the weight of the objective depends on the model; it must be a function of the batch alone")
    return means


def smoothed_cross_entropy(logits: Tensor, target: Tensor, epsilon: float) -> Mean:
    """Take the cross-entropy against targets of which a share is spread over all classes.

    Source: Szegedy et al., "Rethinking the Inception Architecture", arXiv 1512.00567; equal to ``LabelSmoother`` of
    transformers.

    Args:
        logits: ``[..., classes]``.
        target: Class indices, ``[...]``; -100 is left out.
        epsilon: The share, from 0 to 1.

    Returns:
        The sum over what is not left out, and its number.

    Raises:
        ValueError: The share is not between 0 and 1.

    Example:
        >>> float(smoothed_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]), epsilon=0.1))
        1.386
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"smoothed_cross_entropy: epsilon must be between 0 and 1, got {epsilon}")
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    rows = logits.reshape(-1, logits.shape[-1])
    total = F.cross_entropy(rows, target.reshape(-1), reduction="sum", label_smoothing=epsilon)
    return Mean(total, _labelled(target))
