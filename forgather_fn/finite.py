"""Whether a step may update: decided on the device, or on the host where looking costs nothing."""

import math
from typing import Protocol

import torch
from torch import Tensor

from forgather_fn.state import NonFiniteError, nonfinite_message

FINE, BAD = torch.tensor(0.0, dtype=torch.float32), torch.tensor(1.0, dtype=torch.float32)
"""The flag, where the host knows it."""


class Flag(Protocol):
    """Decide whether an update may happen."""

    def __call__(self, policy: str, probe: Tensor, nonfinite: Tensor, step: int | Tensor, /) -> tuple[Tensor, Tensor]:
        """Give 1.0 where it must not, else 0.0; and the first step that was not finite, or -1."""
        ...


def flag_on_host(policy: str, probe: Tensor, nonfinite: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
    """Look at a number on the CPU; see :func:`flag_on_device`.

    Raises:
        NonFiniteError: It is not finite and the policy is to raise; the state has not been touched.
    """
    if math.isfinite(probe.item()):
        return FINE, nonfinite
    if policy == "raise":
        raise NonFiniteError(nonfinite_message(int(step)))
    return BAD, nonfinite


def flag_on_device(policy: str, probe: Tensor, nonfinite: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
    """Decide on the device whether an update may happen, without waiting for it.

    Args:
        policy: ``"raise"``: this update and all later ones are blocked; ``"skip"``: this one only.
        probe: A scalar that is finite if, and only if, the loss and every gradient are.
        nonfinite: The first step that was not finite, or -1.
        step: This step.

    Returns:
        1.0 where the update must not happen, else 0.0; and the new ``nonfinite``.
    """
    bad = (probe - probe).ne(0)  # x - x is 0 for every finite x, and nan for every other
    if policy == "skip":
        return bad.float(), nonfinite
    blocked = bad | (nonfinite >= 0)
    return blocked.float(), torch.where(bad & (nonfinite < 0), step, nonfinite)


def applied(found_inf: Tensor) -> Tensor | float:
    """Give 1 where an update happens and 0 where it does not: a number where the host knows it, saving an operation."""
    if found_inf is FINE:
        return 1.0
    return 1.0 - found_inf
