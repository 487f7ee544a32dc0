"""Cross-entropy, over the next token or over classes."""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from forgather_fn.losses.base import Objective
from forgather_fn.losses.finding import TARGETS, labelled, logits_of, target_of
from forgather_fn.mean import Mean


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
    return target.numel() // target.shape[1] if target.is_floating_point() else labelled(target)


causal_lm = Objective(
    total=_causal_lm_total,
    weight=lambda batch: labelled(target_of(batch)[..., 1:]),
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
    return Mean(total, labelled(target))
