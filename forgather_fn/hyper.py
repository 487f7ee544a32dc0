"""Hyperparameters: those that a group of parameters has of its own, and those that change from step to step."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import attrs
from torch import Tensor

Scalar = float | Tensor
"""A number, or a scalar tensor in a compiled step."""

Values = Mapping[str, Scalar]
"""What schedules give at a step, by name."""

NO_VALUES: Final[Values] = MappingProxyType({})


@attrs.frozen
class Scheduled:
    """Stand for a number that another is put in place of at each step: the value under this name."""

    name: str


Number = float | Scheduled


@attrs.frozen
class Hyper:
    """What a group of parameters has of its own. Leaves of equal hyperparameters lie side by side.

    Attributes:
        learning_rate: Factor on the scheduled learning rate.
        weight_decay: The coefficient, as the optimizer understands it; None for whatever it does by itself.
        frozen: Not trained: kept out of the flat storage, and shared rather than copied.
        part: Which optimizer of a composed one updates them; ``"outer/inner"`` where that is composed again.
    """

    learning_rate: Number = 1.0
    weight_decay: Number | None = 0.0
    frozen: bool = False
    part: str = ""
