"""Noise on gradients."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from forgather_fn.describe import described
from forgather_fn.gradient import Gradients
from forgather_fn.random import key, seeded
from forgather_fn.schedules import Schedule, rate
from forgather_fn.schedules.base import check
from forgather_fn.transforms.base import Transform, nothing


@described
def noise(std: float | Schedule) -> Transform:
    """Add normal noise to every gradient.

    Each parameter's noise derives from the run's seed, the step and its name, so that it does not depend on the order
    of parameters, on a split of the model, or on a restart.

    Args:
        std: Standard deviation, in units of the mean gradient; or a schedule of it, such as :func:`annealed`.
    """
    if not callable(std) and not (math.isfinite(std) and std >= 0):
        raise ValueError(f"noise: std must be a number of at least 0, got {std}")

    def update(
        gradients: Gradients, state: Any, *, params: Mapping[str, Tensor], step: int | Tensor, seed: int | Tensor
    ) -> tuple[Mapping[str, Tensor], Any]:
        del params
        noisy, size = {}, rate(std, int(step))
        for name, gradient in gradients.items():
            with seeded(key(int(seed), int(step), "noise", name), gradient.device):
                noisy[name] = gradient + size * torch.randn_like(gradient)
        return noisy, state

    return Transform(nothing, update, compiles=False)  # its keys are made on the host


@described
def annealed(*, eta: float, gamma: float = 0.55) -> Schedule:
    """Give the standard deviation ``sqrt(eta / (1 + step) ** gamma)``, for :func:`noise`.

    Source: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", arXiv 1511.06807; they
    use an ``eta`` of 0.01, 0.3 or 1.0, and a ``gamma`` of 0.55.

    Args:
        eta: The variance at step 0.
        gamma: How fast it falls.

    Raises:
        ValueError: A number is negative or not finite.

    Example:
        >>> [round(annealed(eta=0.01)(step), 4) for step in (0, 10, 1000)]
        [0.1, 0.0517, 0.015]
    """
    check(float, eta=eta, gamma=gamma)
    return lambda step: math.sqrt(eta / (1 + step) ** gamma)
