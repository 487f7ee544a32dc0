"""What elements of a loss count for: weights of samples, tokens and classes, and masks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.losses.base import Objective
from forgather_fn.losses.finding import target_of
from forgather_fn.losses.pairing import Pairing
from forgather_fn.losses.terms import objective, safe_targets, terms_of


def beside(batch: Any, key: str, what: str) -> Tensor:
    """Read an entry of a dict batch.

    Raises:
        ValueError: There is none.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"{what}: by={key!r} is a key of a dict batch, and this one is a {type(batch).__name__}")
    if key not in batch:
        raise ValueError(f"{what}: the batch has no {key!r}; it has {sorted(map(str, batch))}")
    found = batch[key]
    if not isinstance(found, Tensor):
        raise ValueError(f"{what}: batch[{key!r}] must be a tensor, got {type(found).__name__}")
    return found


def in_line(found: Tensor, batch: Any, pairing: Pairing, what: str) -> Tensor:
    """Bring an entry that has one number for each sample, or for each target, into line with predictions.

    Raises:
        ValueError: It has neither shape.
    """
    keep, target = pairing.keep(batch), target_of(batch)
    if found.shape == target.shape or (target.is_floating_point() and pairing.classes and found.shape == keep.shape):
        return pairing.along(found)
    if found.dim() == 1 and len(found) == len(target):
        return found.reshape(-1, *(1,) * (keep.dim() - 1)).expand(keep.shape)
    raise ValueError(
        f"{what} has shape {tuple(found.shape)}; expected one number a sample, ({len(target)},), or one for each "
        f"target, {tuple(target.shape)}"
    )


@described
def weighted(loss: Objective, *, by: str) -> Objective:
    """Let each sample, or each token, count for a weight that is in the batch.

    The loss is the sum of the weighted losses divided by the sum of the weights. Weights multiply where several are
    given. What ``state.tokens`` counts are weights too.

    Args:
        loss: A sum over elements.
        by: A key of the batch: weights of at least 0, ``[batch]`` or of the shape of the target, where an entry belongs
            to the target at its place (it is shifted as labels are). The model is not given it.

    Raises:
        ValueError: The loss is no sum over elements; when called: there is no such key, or its shape fits neither.

    Example:
        >>> batch = {"y": torch.tensor([0.0, 0.0]), "importance": torch.tensor([3.0, 1.0])}
        >>> from forgather_fn.losses import mse
        >>> float(weighted(mse, by="importance")(torch.tensor([1.0, 5.0]), batch))
        7.0
    """
    terms = terms_of(loss, "weighted")

    def counts(batch: Any) -> Tensor:
        weights = in_line(beside(batch, by, "weighted"), batch, terms.pairing, f"weighted: batch[{by!r}]")
        return terms.weights(batch) * weights.detach()

    return objective(attrs.evolve(terms, counts=counts), of=loss, withheld=(by,))


@described
def class_weighted(loss: Objective, weights: Sequence[float]) -> Objective:
    """Let each element count for the weight of its class.

    The sum is divided by the sum of the weights, as ``torch.nn.CrossEntropyLoss(weight=...)`` divides it.

    Args:
        loss: A loss of classes.
        weights: One for each class, of at least 0.

    Raises:
        ValueError: The loss is of something else, or a weight is negative; when called: targets are probabilities, or
            of more classes.
    """
    terms = terms_of(loss, "class_weighted", classes=True)
    if not isinstance(weights, Iterable):
        raise ValueError(f"class_weighted: weights must be one number for each class; got {weights!r}")
    table = torch.tensor(tuple(weights), dtype=torch.float64)
    if table.dim() != 1 or not len(table) or not bool(torch.isfinite(table).all() & (table >= 0).all()):
        raise ValueError(f"class_weighted: weights must be numbers of at least 0, one for each class; got {weights}")

    def counts(batch: Any) -> Tensor:
        targets = safe_targets(terms.pairing, batch)
        if targets.is_floating_point():
            raise ValueError("class_weighted: targets are probabilities of classes; it takes class indices")
        dtype = torch.float32 if targets.device.type == "mps" else torch.float64
        return terms.weights(batch) * table.to(targets.device, dtype)[targets]

    return objective(attrs.evolve(terms, counts=counts), of=loss)


@described
def masked(loss: Objective, *, by: str) -> Objective:
    """Leave out the samples, or tokens, whose mask in the batch is 0; metrics leave them out too.

    Args:
        loss: A sum over elements.
        by: A key of the batch: bool, or integers of 0 and 1, ``[batch]`` or of the shape of the target, where an entry
            belongs to the target at its place (it is shifted as labels are). The model is not given it; one that takes
            it too needs it under another name.

    Raises:
        ValueError: The loss is no sum over elements; when called: there is no such key, its shape fits neither, or it
            is floating.
    """
    terms = terms_of(loss, "masked")
    pairing = terms.pairing

    def keep(batch: Any) -> Tensor:
        mask = beside(batch, by, "masked")
        if mask.is_floating_point():
            raise ValueError(f"masked: batch[{by!r}] is floating; a mask is bool, or ff.losses.weighted(by={by!r})")
        return pairing.keep(batch) & in_line(mask, batch, pairing, f"masked: batch[{by!r}]").bool()

    kept = attrs.evolve(pairing, keep=keep, names=(*pairing.names, by))
    return objective(attrs.evolve(terms, pairing=kept), of=loss)


@described
def ignoring(loss: Objective, *, index: int) -> Objective:
    """Leave out the targets of one class, such as a padding token, as well as -100; metrics leave them out too.

    Args:
        loss: A loss of classes.
        index: Of the class.

    Raises:
        ValueError: The loss is of something else; when called: targets are probabilities.
    """
    terms = terms_of(loss, "ignoring", classes=True)
    pairing = terms.pairing

    def keep(batch: Any) -> Tensor:
        targets = pairing.targets(batch)
        if targets.is_floating_point():
            raise ValueError("ignoring: targets are probabilities of classes; it takes class indices")
        return pairing.keep(batch) & (targets != index)

    return objective(attrs.evolve(terms, pairing=attrs.evolve(pairing, keep=keep)), of=loss)
