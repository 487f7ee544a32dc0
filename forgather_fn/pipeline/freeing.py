"""Letting go of the parameters of other stages: in their places are stand-ins of their shape that take no memory."""

from collections.abc import Callable
from typing import Final

import attrs
import torch
from torch import Tensor, nn

from forgather_fn.model import Site, parameter_sites

_FREED: Final = "_freed_parameters"
"""Under this attribute a module keeps what it had, by the names that the parameters had."""


@attrs.frozen(eq=False)
class Freed:
    """What is in the place of a parameter that was freed.

    Attributes:
        stand: Zeros of its shape, in the memory of one element.
        requires_grad: Whether the parameter was to be trained.
    """

    stand: Tensor
    requires_grad: bool


def freed(module: nn.Module) -> dict[str, Freed]:
    """Give what stands in for a module's own parameters, by their names in it."""
    found: dict[str, Freed] = vars(module).get(_FREED, {})
    return found


def is_freed(module: nn.Module) -> bool:
    """Tell whether parameters of a module, or of one in it, have been freed."""
    return any(freed(child) for child in module.modules())


def free(module: nn.Module, foreign: Callable[[str], bool], device: torch.device) -> None:
    """Take parameters out of a module, and let stand-ins be read in their places.

    The module's names, its forward, and its other parameters stay as they are.

    Args:
        module: Changed in place.
        foreign: Tells, of the first name of a parameter, whether it goes.
        device: Of the stand-ins.
    """
    stands: dict[str, Freed] = {}
    for site, name in parameter_sites(module):
        if foreign(name):
            if name not in stands:
                zero = torch.zeros((), dtype=site.tensor.dtype, device=device)
                stands[name] = Freed(zero.expand(site.tensor.shape), site.tensor.requires_grad)
            _put(site, stands[name])


def _put(site: Site, instead: Freed) -> None:
    del site.module._parameters[site.attribute]
    vars(site.module).setdefault(_FREED, {})[site.attribute] = instead
    vars(site.module)[site.attribute] = instead.stand


def filled(module: nn.Module, values: Callable[[str, Freed], nn.Parameter]) -> None:
    """Put parameters in the places of stand-ins again.

    Args:
        module: Changed in place.
        values: For the name of a place, and what stands there, what comes there.
    """
    for prefix, child in module.named_modules():
        for attribute, instead in vars(child).pop(_FREED, {}).items():
            del vars(child)[attribute]
            child.register_parameter(attribute, values(f"{prefix}.{attribute}" if prefix else attribute, instead))
