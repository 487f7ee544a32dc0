"""Metrics that a step computes only when it is asked to, so that they cost nothing on all other steps."""

import difflib
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients, Spread, norms

WANTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "gradient_norms": "grad_norm/",
        "parameter_norms": "param_norm/",
        "update_norms": "update_norm/",
        "gradients": "gradient/",
    }
)
"""What a step can be asked for, and what the names of its metrics then begin with; the parameter's name follows.

``gradient_norms`` and ``gradients`` are of the mean gradient before transforms; ``parameter_norms`` are of the
parameters that the step leaves; ``update_norms`` of their difference to those that it was given. ``gradients`` are
copies, all others are scalars.
"""


def check_wants(wants: Collection[str]) -> None:
    """Make sure that a step can give the metrics that it is asked for.

    Raises:
        ValueError: It cannot.
    """
    if isinstance(wants, str):
        raise ValueError(f"a step was asked for {wants!r}, which is one name: wants takes a set of them, {{{wants!r}}}")
    unknown = sorted(set(wants) - set(WANTS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], WANTS, n=len(WANTS), cutoff=0.0)
        raise ValueError(f"a step was asked for {unknown}; it can give {near}")


def is_wanted(metric: str, wants: Collection[str]) -> bool:
    """Tell whether a metric of a step is one that it always has, or one of those that were asked for."""
    return all(want in wants or not metric.startswith(prefix) for want, prefix in WANTS.items())


def of_gradients(gradients: Gradients, wants: Collection[str]) -> dict[str, Tensor]:
    """Give what was asked for of a mean gradient.

    Raises:
        ValueError: A metric is unknown; or gradients are asked for where this process has a part of them.
    """
    check_wants(wants)
    found: dict[str, Tensor] = {}
    if "gradient_norms" in wants:
        found |= named("gradient_norms", norms(gradients, gradients.spread))
    if "gradients" in wants:
        if gradients.spread is not None:
            raise ValueError(
                'a step was asked for "gradients", of which this process has a part only, since the model is in '
                'shards or cut into stages; ask for "gradient_norms"'
            )
        found |= named("gradients", {name: gradient.clone() for name, gradient in gradients.items()})
    return found


def of_update(params: Flat, wants: Collection[str], spread: Spread | None) -> Callable[[], dict[str, Tensor]]:
    """Begin to look at an update of parameters, in place.

    Returns:
        What is called after it, and gives what was asked for.
    """
    before = params.copy() if "update_norms" in wants else None

    def after() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if "parameter_norms" in wants:
            found |= named("parameter_norms", norms(params, spread))
        if before is not None:
            torch._foreach_sub_(list(before.buffers), list(params.buffers))
            found |= named("update_norms", norms(before, spread))
        return found

    return after


def named(want: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the metrics of a want after the parameters that they are of."""
    return {f"{WANTS[want]}{name}": value for name, value in found.items()}
