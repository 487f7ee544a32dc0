"""Letting go of the parameters of other stages: in their places are stand-ins of their shape that take no memory."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from forgather_fn.model import Site, parameter_sites

FREED: Final = "_freed_parameters"
"""Under this attribute a module keeps its stand-ins, by the names that the parameters had."""


def stand_in(tensor: Tensor, device: torch.device) -> Tensor:
    """Make a tensor of zeros of the same shape that takes the memory of one element."""
    return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)


def free(module: nn.Module, foreign: Callable[[str], bool], device: torch.device) -> None:
    """Take parameters out of a module, and let stand-ins be read in their places.

    The module's names, its forward, and its other parameters stay as they are.

    Args:
        module: Changed in place.
        foreign: Tells, of the first name of a parameter, whether it goes.
        device: Of the stand-ins.
    """
    stands: dict[str, Tensor] = {}
    for site, name in parameter_sites(module):
        if foreign(name):
            if name not in stands:
                stands[name] = stand_in(site.tensor, device)
            _put(site, stands[name])


def _put(site: Site, stand: Tensor) -> None:
    del site.module._parameters[site.attribute]
    vars(site.module).setdefault(FREED, {})[site.attribute] = stand
    vars(site.module)[site.attribute] = stand


def filled(module: nn.Module, values: Callable[[str], Tensor]) -> None:
    """Put parameters in the places of stand-ins again.

    Args:
        module: Changed in place.
        values: For the name of a place, what is there.
    """
    for prefix, child in module.named_modules():
        for attribute in vars(child).pop(FREED, {}):
            del vars(child)[attribute]
            child.register_parameter(attribute, nn.Parameter(values(f"{prefix}.{attribute}" if prefix else attribute)))
