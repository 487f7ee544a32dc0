"""Groups of parameters: which have hyperparameters of their own."""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import attrs
from torch import Tensor

from forgather_fn.describe import describe
from forgather_fn.flat import Hyper, listed

Predicate = Callable[[str, Tensor], bool]


@attrs.frozen
class Group:
    """Which parameters have hyperparameters of their own: made by :func:`group`."""

    match: str | Predicate = attrs.field(repr=describe)
    learning_rate: float
    weight_decay: float | None
    frozen: bool


def group(
    match: str | Predicate, *, learning_rate: float = 1.0, weight_decay: float | None = None, frozen: bool = False
) -> Group:
    """Give some parameters hyperparameters of their own. Where several groups match, the first counts.

    Args:
        match: A pattern for the qualified name (``"encoder.*"``, ``"*.bias"``), or a predicate of name and tensor.
        learning_rate: Factor on the scheduled learning rate.
        weight_decay: The coefficient; None for the optimizer's default.
        frozen: Do not train them.

    Raises:
        ValueError: A number is negative or not finite; or, when a state is made, the group matches no parameter.

    Example:
        >>> import torch, forgather_fn as ff
        >>> ff.adamw(groups=[ff.group("head.*", learning_rate=10.0), ff.group("embed.*", frozen=True)]).groups(
        ...     {"embed.weight": torch.zeros(2, 2), "head.weight": torch.zeros(2, 2)}
        ... )["embed.weight"].frozen
        True
    """
    check_numbers(learning_rate=learning_rate, weight_decay=weight_decay)
    return Group(match, learning_rate, weight_decay, frozen)


def matrices(name: str, tensor: Tensor) -> bool:
    """Say that tensors of two or more dimensions decay, and others (biases, norms' gains) do not."""
    del name
    return tensor.dim() >= 2


def assigner(
    groups: Sequence[Group], weight_decay: float | None, decays: Predicate
) -> Callable[[Mapping[str, Tensor]], Mapping[str, Hyper]]:
    """Make the function that names each parameter's hyperparameters.

    Raises:
        ValueError: A number is out of range; or, when called, a group matches no parameter.
    """
    check_numbers(weight_decay=weight_decay)

    def matches(one: Group, name: str, tensor: Tensor) -> bool:
        return fnmatchcase(name, one.match) if isinstance(one.match, str) else bool(one.match(name, tensor))

    def assign(params: Mapping[str, Tensor]) -> Mapping[str, Hyper]:
        chosen: dict[str, Hyper] = {}
        used: set[int] = set()
        for name, tensor in params.items():
            decay = weight_decay if weight_decay is None or decays(name, tensor) else 0.0
            own = [i for i, one in enumerate(groups) if matches(one, name, tensor)]
            used.update(own)
            if not own:
                chosen[name] = Hyper(weight_decay=decay)
                continue
            first = groups[own[0]]
            decay = decay if first.weight_decay is None else first.weight_decay
            chosen[name] = Hyper(first.learning_rate, decay, first.frozen)
        for i, one in enumerate(groups):
            if i not in used:
                raise ValueError(
                    f"group {describe(one.match)} matches no parameter; the parameters are {listed(sorted(params))}"
                )
        return chosen

    return assign


def check_numbers(**numbers: float | None) -> None:
    """Make sure that named numbers, where given, are finite and not negative."""
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {number}")
