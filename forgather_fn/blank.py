"""Copies of a model without values, to be filled in when a model is taken out of the training."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def blank_of(module: nn.Module) -> nn.Module | Exception:
    """Copy a module without the values of its parameters, which are on the meta device there."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = empty
    try:
        return copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        return error


def filled_in(
    blank: nn.Module, sites: Sequence[tuple[str, str]], values: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> nn.Module:
    """Give a model without values its own."""
    made: dict[int, nn.Parameter] = {}
    for place, name in sites:
        prefix, _, attribute = place.rpartition(".")
        held = blank.get_submodule(prefix)._parameters
        old = held[attribute]
        assert old is not None
        if id(old) not in made:
            made[id(old)] = nn.Parameter(values[name], requires_grad=old.requires_grad)
        held[attribute] = made[id(old)]
    for place, value in buffers.items():
        prefix, _, attribute = place.rpartition(".")
        blank.get_submodule(prefix)._buffers[attribute] = value
    return blank
