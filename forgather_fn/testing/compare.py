"""Comparing to the bit, and up to rounding."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from forgather_fn import tree
from forgather_fn.flat import listed
from forgather_fn.mean import Mean

TOLERANCE: Final = 1e-12
"""What sums of float64 numbers in another order may differ by, relative to their size."""

LEAST_SCALE: Final = 0.01
"""A leaf is compared relative to its own largest element, but to no less than this part of the largest of all leaves:
gradients that are zero in exact arithmetic, such as that of a bias before a softmax, are rounding and nothing else."""

ROUNDING: Final = (
    "A loss that is computed in float32 even here, as those of Hugging Face models are, is exact to about 1e-6 only: "
    "say tolerance=1e-5 then."
)


def snapshot(data: Any) -> dict[str, Any]:
    """Keep every leaf of a tree by its path: tensors and arrays as copies, anything else itself."""
    return {path: _kept(leaf) for path, leaf in tree.walk(data)}


def _kept(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
        return torch.from_numpy(leaf.copy())
    return leaf


def changed(before: Mapping[str, Any], data: Any) -> str | None:
    """Name the first leaf in which a tree differs from a snapshot of it, to the bit."""
    return tree.difference(before, snapshot(data))


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Give metrics as a tree: each mean as its total and weight."""
    return {
        name: {"total": value.total, "weight": value.weight} if isinstance(value, Mean) else value
        for name, value in metrics.items()
    }


def beyond(expected: Tensor, found: Tensor, scale: float, tolerance: float) -> str | None:
    """Say by how much two tensors differ, if that is more than rounding; equal infinities and nans do not differ.

    Args:
        expected: Of any shape and data type.
        found: Of the same shape.
        scale: What the difference is relative to, at least.
        tolerance: How much of that it may be.
    """
    one, other = expected.detach().double(), found.detach().double()
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, (one - other).abs()).nan_to_num(nan=torch.inf)
    worst = float(gap.max()) if gap.numel() else 0.0
    scale = max(scale, largest(one))
    if worst <= tolerance * scale:
        return None
    at = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)] if gap.dim() else []
    return (
        f"by {worst:.3g} at {at} ({one[tuple(at)].item()} and {other[tuple(at)].item()}), which is {worst / scale:.3g} "
        f"of the size {scale:.3g}; the tolerance is {tolerance:g}"
    )


def largest(tensor: Tensor) -> float:
    """Give the largest finite magnitude in a tensor, at least the smallest normal number."""
    finite = tensor.detach().double().abs().nan_to_num(nan=0.0, posinf=0.0)
    return max(float(finite.max()) if finite.numel() else 0.0, torch.finfo(torch.float64).tiny)


def means_difference(expected: Mapping[str, Mean], found: Mapping[str, Mean], tolerance: float) -> str | None:
    """Say which named mean differs by more than rounding."""
    odd = sorted(set(expected) ^ set(found))
    if odd:
        return f"only one of them has a mean named {listed(odd)}"
    for name, mean in expected.items():
        other = found[name]
        weight, other_weight = (torch.as_tensor(m.weight, dtype=torch.float64) for m in (mean, other))
        gap = beyond(weight, other_weight, LEAST_SCALE, tolerance)
        if gap:
            return f"the weight of {name!r} differs {gap}"
        gap = beyond(mean.total.double() / weight, other.total.double() / other_weight, LEAST_SCALE, tolerance)
        if gap:
            return f"{name!r} differs {gap}"
    return None
