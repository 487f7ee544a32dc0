"""Which predictions of a model belong to which targets of a batch."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn.losses.finding import TARGETS, logits_of, target_of


@attrs.frozen(kw_only=True)
class Pairing:
    """How predictions and targets are brought into line, element by element.

    Attributes:
        predictions: ``(outputs, batch) -> [..., classes]``, or ``[...]`` where predictions are values.
        targets: ``batch -> [...]``; or ``[..., classes]``, probabilities of classes.
        along: Brings an entry of the batch that has one number for each of its targets into line with them: what is
            shifted or cut of the targets is so of it.
        keep: ``batch -> [...]``, bool: which elements count.
        classes: Whether predictions are of classes, the last dimension, and not values.
        names: Keys of a dict batch that it reads, which the model is not given.
    """

    predictions: Callable[[Any, Any], Tensor]
    targets: Callable[[Any], Tensor]
    along: Callable[[Tensor], Tensor]
    keep: Callable[[Any], Tensor]
    classes: bool
    names: tuple[str, ...] = TARGETS


def class_targets(batch: Any) -> Tensor:
    """Give the target in which classes are numbers ``[...]``, or probabilities with the classes last.

    Raises:
        ValueError: It is floating, and has no dimension of classes.
    """
    target = target_of(batch)
    if target.is_floating_point() and target.dim() < 2:
        raise ValueError(
            f"a floating target of shape {tuple(target.shape)} ({target.dtype}) cannot be probabilities of classes "
            "[batch, classes, ...]; class indices are integers: target.long()"
        )
    return target.movedim(1, -1) if target.is_floating_point() else target


def class_logits(outputs: Any, batch: Any) -> Tensor:
    """Give logits with the classes last: ``[batch, ..., classes]`` as they are, or torch's ``[batch, classes, ...]``.

    Raises:
        ValueError: Their shape is neither.
    """
    logits, targets = logits_of(outputs), class_targets(batch)
    shape = targets.shape[:-1] if targets.is_floating_point() else targets.shape
    if logits.dim() > 1 and (targets.is_floating_point() or logits.shape[:-1] != shape):
        logits = logits.movedim(1, -1)
    if logits.dim() < 2 or logits.shape[:-1] != shape:
        raise ValueError(
            f"logits of shape {tuple(logits_of(outputs).shape)} do not fit a target of shape "
            f"{tuple(target_of(batch).shape)}: expected [batch, ..., classes] or [batch, classes, ...] against class "
            "indices [batch, ...], or against probabilities [batch, classes, ...]"
        )
    return logits


def not_left_out(targets: Tensor) -> Tensor:
    """Tell which targets count: all but -100; of probabilities, all."""
    return targets[..., 0] == targets[..., 0] if targets.is_floating_point() else targets != -100


def next_tokens(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Give the logits that have a label, ``[batch, time - 1, words]``, and these labels, ``[batch, time - 1]``.

    Raises:
        ValueError: They do not fit, or labels are no integers.
    """
    logits, labels = logits_of(outputs), _token_labels(batch)
    if logits.dim() < 3 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}: "
            "expected [batch, time, words] against [batch, time]"
            + ("; where a sample has one label, use ff.losses.cross_entropy" if labels.dim() < 2 else "")
        )
    return logits[..., :-1, :], labels[..., 1:]


def next_labels(batch: Any) -> Tensor:
    """Give the labels of the next token, ``[batch, time - 1]``.

    Raises:
        ValueError: They are no integers.
    """
    return _token_labels(batch)[..., 1:]


def _token_labels(batch: Any) -> Tensor:
    labels = target_of(batch)
    if labels.is_floating_point():
        raise ValueError(f"labels of tokens are class indices (torch.long), got {labels.dtype}")
    return labels


def itself(tensor: Tensor) -> Tensor:
    """Give what has the shape of the targets as it is."""
    return tensor


BY_CLASS = Pairing(
    predictions=class_logits,
    targets=class_targets,
    along=itself,
    keep=lambda batch: not_left_out(class_targets(batch)),
    classes=True,
)
"""Logits against the classes of the same position; -100 is left out."""

NEXT_TOKEN = Pairing(
    predictions=lambda outputs, batch: next_tokens(outputs, batch)[0],
    targets=next_labels,
    along=lambda tensor: tensor[..., 1:],
    keep=lambda batch: not_left_out(next_labels(batch)),
    classes=True,
)
"""Logits against the label of the next position; -100 is left out."""


def by_value(name: str) -> Pairing:
    """Pair values with values of the same shape, all of which count; a loss of this name, for messages."""

    def values(outputs: Any, batch: Any) -> Tensor:
        predictions, targets = logits_of(outputs), target_of(batch)
        if predictions.shape != targets.shape:
            raise ValueError(
                f"{name}: the prediction's shape {tuple(predictions.shape)} is not the target's "
                f"{tuple(targets.shape)}; reshape one of them, for example the target with unsqueeze(-1)"
            )
        return predictions

    def keep(batch: Any) -> Tensor:
        target = target_of(batch)
        return target.new_ones((), dtype=torch.bool).expand(target.shape)

    return Pairing(predictions=values, targets=target_of, along=itself, keep=keep, classes=False)


@attrs.frozen(repr=False)
class Paired:
    """A measure of predictions and targets that a loss brings into line: an accuracy shifts labels where its loss does.

    Called by itself, it compares logits with classes of the same position.

    Attributes:
        make: ``pairing -> metric`` or aggregate.
        description: How it prints.
    """

    make: Callable[[Pairing], Any]
    description: str = ""

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """Measure one batch."""
        return self.make(BY_CLASS)(outputs, batch)

    def as_in(self, loss: Any) -> Any:
        """Give the measure of what is compared in a loss.

        Raises:
            ValueError: The loss does not tell which predictions belong to which targets.
        """
        terms = getattr(loss, "terms", None)
        if terms is None:
            raise ValueError(
                f"{self!r}: the loss {loss!r} does not tell which predictions belong to which targets; say so by a "
                "loss that does: ff.metrics.accuracy.as_in(ff.losses.cross_entropy), or causal_lm, where labels are "
                "those of the next token"
            )
        return self.make(terms.pairing)

    def __repr__(self) -> str:
        return self.description
