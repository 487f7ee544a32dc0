"""Measures of classes, chosen by the largest logit."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.losses.pairing import Paired, Pairing
from forgather_fn.losses.terms import safe_targets
from forgather_fn.mean import Mean
from forgather_fn.metrics.base import Aggregate, Metric, Partial

T = TypeVar("T", Metric, Aggregate)


def _classes(what: str, pairing: Pairing, outputs: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Give logits ``[..., classes]``, targets ``[...]`` and which of them count.

    Raises:
        ValueError: They are of values, or targets are probabilities.
    """
    if not pairing.classes:
        raise ValueError(f"{what}: it compares classes, and the loss is one of values")
    targets = safe_targets(pairing, batch)
    if targets.is_floating_point():
        raise ValueError(f"{what}: it compares with classes, and the targets are probabilities ({targets.dtype})")
    return pairing.predictions(outputs, batch), targets, pairing.keep(batch)


def _counted(hits: Tensor, keep: Tensor) -> Mean:
    return Mean((hits & keep).sum(), keep.sum())


def _accuracy(pairing: Pairing) -> Metric:
    def measure(outputs: Any, batch: Any, /) -> Mapping[str, Mean]:
        logits, targets, keep = _classes("accuracy", pairing, outputs, batch)
        return {"accuracy": _counted(logits.argmax(-1) == targets, keep)}

    return measure


accuracy = Paired(_accuracy, "accuracy")
"""The share of targets whose class has the largest logit, as ``accuracy``."""


@described
def top_k(k: int) -> Paired:
    """Take the share of targets whose class is among those of the k largest logits, as ``top_<k>_accuracy``.

    Args:
        k: At least 1; when called: at most the number of classes.

    Raises:
        ValueError: It is not.
    """
    _check_positive("top_k", "k", k)

    def make(pairing: Pairing) -> Metric:
        def measure(outputs: Any, batch: Any, /) -> Mapping[str, Mean]:
            logits, targets, keep = _classes("top_k", pairing, outputs, batch)
            if k > logits.shape[-1]:
                raise ValueError(f"top_k: k={k}, but there are {logits.shape[-1]} classes")
            hits = (logits.topk(k, -1).indices == targets.unsqueeze(-1)).any(-1)
            return {f"top_{k}_accuracy": _counted(hits, keep)}

        return measure

    return Paired(make)


def _check_positive(what: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what}: {name} must be an integer of at least 1, got {value!r}")


def _confused(what: str, classes: int, result: Callable[[Tensor], Mapping[str, float]]) -> Paired:
    """Count how often each class was taken for each, and make numbers of that table, ``[targets, predictions]``."""
    _check_positive(what, "classes", classes)

    def make(pairing: Pairing) -> Aggregate:
        def add(partial: Partial, outputs: Any, batch: Any, /) -> Partial:
            logits, targets, keep = _classes(what, pairing, outputs, batch)
            if logits.shape[-1] != classes:
                raise ValueError(f"{what}: classes={classes}, but the model's logits are of {logits.shape[-1]} classes")
            pairs = (targets * classes + logits.argmax(-1))[keep]
            table = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
            return {"confusion": partial["confusion"] + table}

        return Aggregate(
            init=lambda: {"confusion": torch.zeros(classes, classes, dtype=torch.int64)},
            add=add,
            result=lambda partial: result(partial["confusion"]),
        )

    return Paired(make)


@described
def confusion(*, classes: int) -> Paired:
    """Count how often each class was taken for each, as ``confusion_<target>_<prediction>``.

    Args:
        classes: How many there are.

    Raises:
        ValueError: It is not at least 1; when called: the model has another number of them.
    """

    def result(table: Tensor) -> Mapping[str, float]:
        rows = enumerate(table.tolist())
        return {f"confusion_{i}_{j}": float(count) for i, row in rows for j, count in enumerate(row)}

    return _confused("confusion", classes, result)


@described
def f1(*, classes: int) -> Paired:
    """Take the F1 score over all targets together, ``f1_micro``, and its mean over classes, ``f1_macro``.

    A class's score is ``2 * tp / (2 * tp + fp + fn)``. The mean is over those classes that are targets or predictions
    at all. Equal to ``sklearn.metrics.f1_score``.

    Args:
        classes: How many there are.

    Raises:
        ValueError: It is not at least 1; when called: the model has another number of them.
    """

    def result(table: Tensor) -> Mapping[str, float]:
        hits, seen = table.diagonal().double(), (table.sum(0) + table.sum(1)).double()
        scores = (2 * hits / seen)[seen > 0]
        return {"f1_micro": float(2 * hits.sum() / seen.sum()), "f1_macro": float(scores.mean())}

    return _confused("f1", classes, result)
