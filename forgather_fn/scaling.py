"""The loss scale of float16: data in the state, changed by a pure function of what a step found.

float16 holds no number above 65504 and loses those below 6e-8, where many gradients lie. So the loss is multiplied by
a scale before the backward pass, and the gradient divided by it after. A gradient that overflows says that the scale is
too large: that update is left out, and the scale halved. After many updates in a row it is doubled again.

Source: Micikevicius et al., "Mixed Precision Training", 2018; the numbers are those of ``torch.amp.GradScaler``.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

INITIAL: Final = 2.0**16
"""The first scale."""

GROWTH: Final = 2.0
"""What the scale is multiplied by after :data:`INTERVAL` updates in a row."""

BACKOFF: Final = 0.5
"""What it is multiplied by after a step whose gradient overflowed."""

INTERVAL: Final = 2000
"""Updates in a row after which the scale grows."""

MINIMUM: Final = 2.0**-24
"""The least scale, float16's smallest number: below it a gradient of 1 would be lost. A gradient that is not finite
even so is the fault of something else."""

LossScale = Mapping[str, Tensor]
"""``scale``, a float32 scalar, and ``growth_tracker``, an int32 scalar: updates in a row. Empty where nothing is
scaled."""


def initial(device: torch.device) -> dict[str, Tensor]:
    """Make the scale that a run starts with."""
    return {
        "scale": torch.full((), INITIAL, dtype=torch.float32, device=device),
        "growth_tracker": torch.zeros((), dtype=torch.int32, device=device),
    }


def overflowed(held: LossScale, norm: Tensor, loss: Tensor | None) -> Tensor:
    """Tell whether a gradient is not finite by the fault of a scale that can still shrink: a bool scalar.

    Args:
        held: The scale.
        norm: The norm of the gradient.
        loss: Before it was scaled, if it is known; one that is not finite is no fault of the scale.
    """
    found = (norm - norm).ne(0) & (held["scale"] > MINIMUM)
    return found if loss is None else found & (loss - loss).eq(0)


def adapted(held: LossScale, found_inf: Tensor, skipped: Tensor) -> dict[str, Tensor]:
    """Give the scale after a step.

    Args:
        held: The scale that the step was made with.
        found_inf: 1 where no update was made, else 0.
        skipped: 1 where the update was left out and the run goes on, else 0. Where only ``found_inf`` is 1 the run has
            stopped, and nothing changes.

    Example:
        >>> one, zero = torch.tensor(1.0), torch.tensor(0.0)
        >>> adapted(initial(torch.device("cpu")), found_inf=one, skipped=one)["scale"]
        tensor(32768.)
    """
    scale, count = held["scale"], held["growth_tracker"]
    counted = count + 1
    due = counted >= INTERVAL
    larger = scale * GROWTH
    grown = torch.where(due & larger.isfinite(), larger, scale)
    smaller = (scale * BACKOFF).clamp(min=MINIMUM)
    updated, left_out = found_inf < 1, skipped > 0
    return {
        "scale": torch.where(updated, grown, torch.where(left_out, smaller, scale)),
        "growth_tracker": torch.where(updated, torch.where(due, 0, counted), torch.where(left_out, 0, count)),
    }
