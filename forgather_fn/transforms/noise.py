"""Noise on gradients."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.gradient import Gradients
from forgather_fn.random import key, seeded
from forgather_fn.transforms.base import Transform, nothing


@described
def noise(std: float) -> Transform:
    """Add normal noise to every gradient.

    Each parameter's noise derives from the run's seed, the step and its name, so that it does not depend on the order
    of parameters, on a split of the model, or on a restart.

    Args:
        std: Standard deviation, in units of the mean gradient.
    """
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"noise: std must be a number of at least 0, got {std}")

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Mapping[str, Tensor], Any]:
        del params
        noisy = {}
        for name, gradient in gradients.items():
            with seeded(key(int(seed), int(step), "noise", name), gradient.device):
                noisy[name] = gradient + std * torch.randn_like(gradient)
        return noisy, state

    return Transform(nothing, update, compiles=False)  # its keys are made on the host
