"""Hyperparameters: those that a group of parameters has of its own, and those that change from step to step."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import attrs
from torch import Tensor

Values = Mapping[str, float | Tensor]
"""What schedules give at a step, by name: numbers, or scalar tensors in a compiled step."""

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

    def at(self, learning_rate: float | Tensor, values: Values) -> tuple[float | Tensor, float | Tensor]:
        """Give learning rate and weight decay at a step, no decay as 0."""
        rate, decay = self.learning_rate, self.weight_decay or 0.0
        if isinstance(rate, Scheduled) or isinstance(decay, Scheduled):
            return learning_rate * valued(rate, values), valued(decay, values)
        return learning_rate * rate, decay


def valued(number: Number, values: Values) -> float | Tensor:
    """Give a hyperparameter's value at a step."""
    return values[number.name] if isinstance(number, Scheduled) else number
