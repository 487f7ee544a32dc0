"""Norms of parameters, gradients and updates, by module."""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch

from forgather_fn.loop import Tick
from forgather_fn.signature import checked
from forgather_fn.stages import Observer
from forgather_fn.wanted import WANTS

_NORMS: Final = ("gradient_norms", "parameter_norms", "update_norms")


@checked
def by_module(metrics: Mapping[str, Any], *, depth: int = 2) -> dict[str, float]:
    """Join the norms of parameters, as a step gives them, to norms of modules, and tell how far each was moved.

    A norm of a module is the root of the sum of squares of its parameters'. ``update_ratio`` is the norm of the update
    divided by that of the parameters after it: around 1e-3 in a training that goes well, by a rule of thumb of Andrej
    Karpathy's (CS231n, https://cs231n.github.io/neural-networks-3/).

    Args:
        metrics: Of a step that was asked for ``"gradient_norms"``, ``"parameter_norms"`` or ``"update_norms"``; others
            are passed over. This waits for the device, once.
        depth: How many parts of a name make a module: 1 for ``layers``, 2 for ``layers.0``, 3 for ``layers.0.mlp``. A
            parameter that lies less deep is in the module that it is of.

    Returns:
        ``grad_norm/<module>``, ``param_norm/<module>``, ``update_norm/<module>`` and ``update_ratio/<module>``, as far
        as there is something that they follow from.

    Raises:
        ValueError: ``depth`` is less than 1.

    Example:
        >>> by_module({"grad_norm/a.0.weight": 3.0, "grad_norm/a.0.bias": 4.0, "loss": 1.0})
        {'grad_norm/a.0': 5.0}
    """
    if depth < 1:
        raise ValueError(f"by_module: depth={depth} is a number of parts of a name, of at least 1")
    prefixes = tuple(WANTS[want] for want in _NORMS)
    names = [name for name in metrics if name.startswith(prefixes)]
    squares: dict[str, float] = {}
    for name, value in zip(names, _floats([metrics[name] for name in names]), strict=True):
        kind, _, parameter = name.partition("/")
        label = f"{kind}/{_module(parameter, depth)}"
        squares[label] = squares.get(label, 0.0) + value * value
    found = {label: math.sqrt(square) for label, square in squares.items()}
    moved = {label.partition("/")[2]: norm for label, norm in found.items() if label.startswith("update_norm/")}
    sizes = {module: found[f"param_norm/{module}"] for module in moved if f"param_norm/{module}" in found}
    return found | {f"update_ratio/{module}": _ratio(moved[module], size) for module, size in sizes.items()}


def _ratio(moved: float, size: float) -> float:
    if size == 0.0:
        return math.inf if moved else 0.0
    return moved / size


def _module(parameter: str, depth: int) -> str:
    *modules, own = parameter.split(".")
    return ".".join(modules[:depth]) or own


def _floats(values: list[Any]) -> list[float]:
    """Bring scalars to the host in one transfer."""
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        return [float(value) for value in values]
    found: list[float] = torch.stack([value.detach().reshape(()).to(values[0].device) for value in values]).tolist()
    return found


@checked
def module_norms(*, depth: int = 2) -> Observer:
    """Look at the norms of gradients, parameters and updates, by module, and at update-to-weight ratios.

    A step that is looked at copies the parameters, to know what it changed; all others do nothing for it. The norms
    are right whatever the strategy: in shards, and on the stages of a pipeline.

    Args:
        depth: As in :func:`by_module`.

    Returns:
        For :func:`~forgather_fn.stages.every` and the like; its results are those of :func:`by_module`.
    """
    by_module({}, depth=depth)
    return Observer(lambda tick: _found(tick, depth), wants=frozenset(_NORMS))


def _found(tick: Tick, depth: int) -> dict[str, float]:
    return by_module(tick.metrics, depth=depth)
