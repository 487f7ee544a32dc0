"""Stages that are written by hand: a model that is a row of modules, each given what the one before has made."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn


class Stages(nn.Module):
    """A model made of stages that are modules of their own, for what cannot be cut by names.

    The first is called as the model is; each other with the hidden state of the one before, and those keyword arguments
    of the model that its ``forward`` takes. It is a model as any other: it trains on one device as well, and is cut by
    its ``split_spec``.

    Args:
        modules: The stages, in order.

    Example:
        >>> model = Stages([nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)])
        >>> dict(model.split_spec)
        {'stages.0': 'end', 'stages.1': 'end'}
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(modules)

    @property
    def split_spec(self) -> dict[str, Any]:
        """Cut it after each module but the last."""
        return {f"stages.{i}": "end" for i in range(len(self.stages) - 1)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stages one after the other."""
        hidden = self.stages[0](*args, **_taken(self.stages[0], kwargs))
        for stage in self.stages[1:]:
            hidden = stage(hidden, **_taken(stage, kwargs))
        return hidden


def _taken(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    names = list(parameters)
    return {name: value for name, value in kwargs.items() if name in names}
