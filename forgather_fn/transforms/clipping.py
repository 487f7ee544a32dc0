"""Transforms that bound gradients."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.gradient import Gradients
from forgather_fn.transforms.base import Transform, nothing


@described
def clipped(max_norm: float | None) -> Transform:
    """Scale the gradient down so that its 2-norm over all parameters is at most ``max_norm``.

    The norm before clipping is reported as ``grad_norm``. It is divided by ``max(1, (norm + 1e-6) / max_norm)``: what
    ``torch.nn.utils.clip_grad_norm_`` multiplies by the inverse of.

    Args:
        max_norm: The threshold, or None to report only.

    Raises:
        ValueError: The threshold is not a positive number.
    """
    if max_norm is not None and not (math.isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"clipped: max_norm must be a positive number, or None to report only; got {max_norm}")

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Gradients, Any]:
        del params, step, seed
        gradients = gradients.measured()
        norm = gradients.norm()
        if max_norm is None:
            return gradients.reporting(grad_norm=norm), state
        if (
            norm.device.type == "cpu" and not torch.compiler.is_compiling()
        ):  # looking is free here, and one call is faster than three
            ratio = (norm.item() + 1e-6) / max_norm
            if ratio <= 1.0:
                return gradients.reporting(grad_norm=norm), state
            return gradients.divided(torch.scalar_tensor(ratio, dtype=norm.dtype), grad_norm=norm), state
        return gradients.divided(((norm + 1e-6) / max_norm).clamp(min=1.0), grad_norm=norm), state

    return Transform(nothing, update, defers=True, elementwise=True)
