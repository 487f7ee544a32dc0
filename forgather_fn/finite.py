"""Whether a step may update: decided on the device, or on the host where looking costs nothing."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from forgather_fn.state import NonFiniteError, nonfinite_message

FINE, BAD = torch.tensor(0.0, dtype=torch.float32), torch.tensor(1.0, dtype=torch.float32)
"""The flag, where the host knows it."""


class Verdict(NamedTuple):
    """Whether a step may update.

    Attributes:
        found_inf: 1.0 where it must not, else 0.0.
        nonfinite: The first step that was not finite, or -1.
        skipped: 1.0 where its update is left out and the run goes on, else 0.0; None where that is known not to be so.
    """

    found_inf: Tensor
    nonfinite: Tensor
    skipped: Tensor | None


class Flag(Protocol):
    """Decide whether an update may happen."""

    def __call__(
        self, policy: str, probe: Tensor, nonfinite: Tensor, step: int | Tensor, overflow: Tensor | None = None, /
    ) -> Verdict:
        """Decide by a scalar that is finite if, and only if, all is; ``overflow`` is 1 where the step is excused."""
        ...


def flag_on_host(
    policy: str, probe: Tensor, nonfinite: Tensor, step: int | Tensor, overflow: Tensor | None = None
) -> Verdict:
    """Look at a number on the CPU; see :func:`flag_on_device`.

    Raises:
        NonFiniteError: It is not finite and the policy is to raise; the state has not been touched.
    """
    if math.isfinite(probe.item()):
        return Verdict(FINE, nonfinite, None)
    if policy == "raise" and not (overflow is not None and overflow.item()):
        raise NonFiniteError(nonfinite_message(int(step)))
    return Verdict(BAD, nonfinite, BAD)


def flag_on_device(
    policy: str, probe: Tensor, nonfinite: Tensor, step: int | Tensor, overflow: Tensor | None = None
) -> Verdict:
    """Decide on the device whether an update may happen, without waiting for it.

    Args:
        policy: ``"raise"``: this update and all later ones are blocked; ``"skip"``: this one only.
        probe: A scalar that is finite if, and only if, the loss and every gradient are.
        nonfinite: The first step that was not finite, or -1.
        step: This step.
        overflow: True where a gradient is not finite because the loss was scaled by too much: this update is blocked,
            whatever the policy, and no later one.
    """
    bad = (probe - probe).ne(0)  # x - x is 0 for every finite x, and nan for every other
    if policy == "skip":
        return Verdict(bad.float(), nonfinite, bad.float())
    fault = bad if overflow is None else bad & ~overflow
    stopped = fault | (nonfinite >= 0)
    first = torch.where(fault & (nonfinite < 0), step, nonfinite)
    if overflow is None:
        return Verdict(stopped.float(), first, None)
    return Verdict((stopped | overflow).float(), first, (overflow & ~stopped).float())


def applied(found_inf: Tensor) -> Tensor | float:
    """Give 1 where an update happens and 0 where it does not: a number where the host knows it, saving an operation."""
    if found_inf is FINE:
        return 1.0
    return 1.0 - found_inf
