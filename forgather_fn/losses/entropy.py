"""Cross-entropy, over the next token or over classes."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from forgather_fn.describe import described
from forgather_fn.losses.base import Objective
from forgather_fn.losses.finding import TARGETS, labelled, logits_of, target_of
from forgather_fn.losses.pairing import BY_CLASS, NEXT_TOKEN, Pairing, class_logits, next_labels, next_tokens
from forgather_fn.losses.terms import Term, Terms, objective
from forgather_fn.wide import wide


def entropies(logits: Tensor, targets: Tensor, reduction: Literal["sum", "none"]) -> Tensor:
    """Compute cross-entropies of rows of logits ``[rows, classes, ...]`` against classes or probabilities.

    Raises:
        ValueError: Logits are no floating numbers, or, on a CPU, a target is no class.
    """
    if not logits.is_floating_point():
        raise ValueError(f"cross-entropy: the logits are of {logits.dtype}; expected floating numbers")
    if not targets.is_floating_point():
        targets = targets.long()
    if torch.compiler.is_compiling():
        return F.cross_entropy(logits, targets, reduction=reduction)
    try:
        return F.cross_entropy(logits, targets, reduction=reduction)
    except IndexError as error:
        raise ValueError(
            f"cross-entropy: {error} The logits are of {logits.shape[1]} classes, which are numbered from 0; -100 is "
            "left out"
        ) from error


def element_entropies(logits: Tensor, targets: Tensor, beside: Tensor | None) -> Tensor:
    """Compute the cross-entropy of each element; see :class:`~forgather_fn.losses.terms.ElementLosses`."""
    del beside
    rows = targets.flatten(0, -2) if targets.is_floating_point() else targets.flatten()
    return entropies(logits.flatten(0, -2), rows, "none").view(logits.shape[:-1])


def entropy_terms(pairing: Pairing) -> Terms:
    """Take a plain cross-entropy apart."""
    return Terms(pairing=pairing, summands=(Term(losses=element_entropies),))


def _causal_lm_total(outputs: Any, batch: Any) -> Tensor:
    logits, labels = next_tokens(outputs, batch)
    shifted = logits.reshape(-1, logits.shape[-1])
    return entropies(wide(shifted), labels.reshape(-1), "sum")


def _cross_entropy_total(outputs: Any, batch: Any) -> Tensor:
    logits, target = logits_of(outputs), target_of(batch)
    logits = wide(logits)
    if logits.dim() != 2 or target.dim() != 1 or len(logits) != len(target) or target.is_floating_point():
        class_logits(logits, batch)  # raises, where shapes do not fit
    if target.is_floating_point():
        return entropies(logits, target, "sum")
    if logits.dim() == target.dim() + 1 and logits.dim() > 2 and logits.shape[:-1] == target.shape:
        logits, target = logits.flatten(0, -2), target.flatten()
    return entropies(logits, target, "sum")


def _class_weight(batch: Any) -> Tensor | float:
    target = target_of(batch)
    return target.numel() // target.shape[1] if target.is_floating_point() and target.dim() > 1 else labelled(target)


causal_lm = Objective(
    total=_causal_lm_total,
    weight=lambda batch: labelled(next_labels(batch)),
    withheld=TARGETS,
    description="causal_lm",
    terms=entropy_terms(NEXT_TOKEN),
)
"""Next-token cross-entropy: logits ``[batch, time, words]`` against labels ``[batch, time]`` shifted by one; -100 is
left out, of the sum and of the weight."""

cross_entropy = Objective(
    total=_cross_entropy_total,
    weight=_class_weight,
    withheld=TARGETS,
    description="cross_entropy",
    terms=entropy_terms(BY_CLASS),
)
"""Classification: logits ``[batch, classes]`` (or ``[batch, ..., classes]``, or torch's ``[batch, classes, ...]``)
against class indices, -100 left out, or against class probabilities.

Where both layouts fit class indices (logits ``[40, 3, 3]``, target ``[40, 3]``), the classes are those of the last
dimension: for logits with classes in dimension 1, give ``logits.movedim(1, -1)``."""


@described
def focal(*, gamma: float = 2.0) -> Objective:
    """Take the focal loss: a cross-entropy in which elements that are predicted well count less.

    An element's loss is ``(1 - p) ** gamma * -log(p)``, where p is the probability of its class.

    Source: Lin et al., "Focal Loss for Dense Object Detection", arXiv 1708.02002; its alpha is
    :func:`~forgather_fn.losses.weighting.class_weighted`, which also divides by the weights.

    Args:
        gamma: How much less; 0 is the cross-entropy.

    Raises:
        ValueError: It is negative, or not finite; when called: targets are probabilities.

    Example:
        >>> float(focal(gamma=0.0)(torch.zeros(1, 4), (None, torch.tensor([1]))))
        1.386
    """
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"focal: gamma must be a number of at least 0, got {gamma}")

    def losses(logits: Tensor, targets: Tensor, beside: Tensor | None) -> Tensor:
        if targets.is_floating_point():
            raise ValueError("focal: targets are probabilities of classes; it takes class indices")
        entropies = element_entropies(logits, targets, beside)
        return (-torch.expm1(-entropies)).clamp(min=0.0) ** gamma * entropies

    return objective(Terms(pairing=BY_CLASS, summands=(Term(losses=losses),)))
