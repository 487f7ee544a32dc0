"""Transforms that bound gradients."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from forgather_fn.describe import describe, described
from forgather_fn.flat import listed
from forgather_fn.gradient import Gradients
from forgather_fn.groups import Predicate, matches
from forgather_fn.schedules import Schedule, rate
from forgather_fn.transforms.base import Transform, nothing
from forgather_fn.wide import wide_norm


def _check(name: str, what: str, number: float) -> None:
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: {what} must be a positive number, got {number}")


def _check_matching(name: str, one: str | Predicate, params: Mapping[str, Tensor]) -> None:
    """Refuse a pattern, or a predicate, that would clip nothing."""
    if not any(matches(one, parameter, tensor) for parameter, tensor in params.items()):
        raise ValueError(f"{name}: {describe(one)} matches no parameter; the parameters are {listed(sorted(params))}")


@described
def clipped(max_norm: float | Schedule | None) -> Transform:
    """Scale the gradient down so that its 2-norm over all parameters is at most ``max_norm``.

    The norm before clipping is reported as ``grad_norm``. It is divided by ``max(1, (norm + 1e-6) / max_norm)``: what
    ``torch.nn.utils.clip_grad_norm_`` multiplies by the inverse of.

    Args:
        max_norm: The threshold; a schedule of it, which is read on the host, and so not in a compiled step; or None to
            report only.

    Raises:
        ValueError: The threshold is not a positive number.
    """
    if isinstance(max_norm, int | float) and not (math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"clipped: max_norm must be a positive number, or None to report only; got {max_norm}")

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Gradients, Any]:
        del params, seed
        gradients = gradients.measured()
        norm = gradients.norm()
        if max_norm is None:
            return gradients.reporting(grad_norm=norm), state
        if isinstance(max_norm, int | float):
            bound = float(max_norm)
        else:
            bound = rate(max_norm, int(step))
            _check("clipped", f"max_norm at step {step}", bound)
        if norm.is_cpu and not torch.compiler.is_compiling():
            ratio = (norm.item() + 1e-6) / bound  # looking is free here, and one call is faster than three
            if ratio <= 1.0:
                return gradients.reporting(grad_norm=norm), state
            return gradients.divided(torch.scalar_tensor(ratio, dtype=norm.dtype), grad_norm=norm), state
        return gradients.divided(((norm + 1e-6) / bound).clamp(min=1.0), grad_norm=norm), state

    return Transform(nothing, update, defers=True, compiles=not callable(max_norm), elementwise=True)


@described
def clipped_by_value(limit: float) -> Transform:
    """Bring every element of the gradient into ``[-limit, limit]``, as ``torch.nn.utils.clip_grad_value_`` does.

    An element that is not finite becomes nan, so that the step is still seen not to be finite.

    Args:
        limit: In units of the mean gradient.

    Raises:
        ValueError: It is not a positive number.
    """
    _check("clipped_by_value", "limit", limit)

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Gradients, Any]:
        del params, step, seed
        for tensor in gradients.whole():
            tensor.copy_(tensor.clamp(-limit, limit) + (tensor - tensor))  # x - x is nan where x is not finite
        return gradients, state

    return Transform(nothing, update, elementwise=True)


@described
def clipped_by_group(limits: Mapping[str | Predicate, float]) -> Transform:
    """Scale the gradient of each group of parameters down so that its 2-norm over the group is at most its limit.

    The norm of each group before clipping is reported as ``group_norm/<pattern>``. Parameters that match nothing are
    left as they are; of several patterns that match, the first counts, as in :func:`~forgather_fn.groups.group`.

    Args:
        limits: The threshold of each pattern for qualified names (``"encoder.*"``), or predicate of name and tensor.

    Raises:
        ValueError: A limit is not a positive number; or, when a state is made, a pattern matches no parameter.

    Example:
        >>> import forgather_fn as ff
        >>> apart = ff.transforms.clipped_by_group({"embed.*": 0.1, "*": 1.0})
    """
    if not limits:
        raise ValueError("clipped_by_group: give at least one pattern and its limit")
    for one, limit in limits.items():
        _check("clipped_by_group", f"the limit of {describe(one)}", limit)

    def grouped(tensors: Mapping[str, Tensor]) -> list[list[str]]:
        groups: list[list[str]] = [[] for _ in limits]
        for name, tensor in tensors.items():
            own = (i for i, one in enumerate(limits) if matches(one, name, tensor))
            if (first := next(own, None)) is not None:
                groups[first].append(name)
        return groups

    def init(params: Mapping[str, Tensor]) -> None:
        for one in limits:
            _check_matching("clipped_by_group", one, params)

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Gradients, Any]:
        del params, step, seed
        groups, reports = grouped(gradients.views), {}
        norms = gradients.square_sums(groups).sqrt()
        for (one, limit), names, norm in zip(limits.items(), groups, norms, strict=True):
            reports[f"group_norm/{one if isinstance(one, str) else describe(one)}"] = norm
            ratio = ((norm + 1e-6) / limit).clamp(min=1.0)
            for name in names:
                view = gradients.views[name]
                view.div_(ratio.to(view.dtype))
        return gradients.reporting(**reports), state

    return Transform(init, update, elementwise=True)


@described
def clipped_by_unit(ratio: float = 0.01, *, eps: float = 1e-3, match: str | Predicate = "*") -> Transform:
    """Scale the gradient of each unit down to at most a share of the norm of the unit's weights.

    A unit is a row along the first dimension: the weights into one output of a linear layer or a convolution; of a
    vector or scalar (biases, gains), all of it. Where ``|g| > ratio * max(|w|, eps)``, the gradient becomes
    ``ratio * max(|w|, eps) * g / max(|g|, 1e-6)``.

    Source: adaptive gradient clipping of Brock et al., "High-Performance Large-Scale Image Recognition Without
    Normalization", arXiv 2102.06171, equation 3; they leave the last layer out, which is what ``match`` is for.

    Args:
        ratio: The share.
        eps: The least norm of weights, so that units that begin at zero can move.
        match: Which parameters: a pattern for the qualified name, or a predicate of name and tensor.

    Raises:
        ValueError: A number is not positive; or, when a state is made, ``match`` matches no parameter.
    """
    _check("clipped_by_unit", "ratio", ratio)
    _check("clipped_by_unit", "eps", eps)

    def init(params: Mapping[str, Tensor]) -> None:
        _check_matching("clipped_by_unit", match, params)

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Gradients, Any]:
        del step, seed
        for name, view in gradients.views.items():
            if not matches(match, name, view):
                continue
            largest = unit_norms(params[name]).clamp(min=eps) * ratio
            norm = unit_norms(view)
            factor = torch.where(norm > largest, largest / norm.clamp(min=1e-6), torch.ones_like(norm))
            view.mul_(factor.to(view.dtype))
        return gradients, state

    return Transform(init, update)


def unit_norms(tensor: Tensor) -> Tensor:
    """Give the 2-norm of each row along the first dimension, of a vector that of all of it, in at least float32."""
    dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else tuple(range(tensor.dim()))
    return wide_norm(tensor, dims, keepdim=True)
