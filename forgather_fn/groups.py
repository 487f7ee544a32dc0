"""Groups of parameters: which have hyperparameters of their own."""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import attrs
from torch import Tensor

from forgather_fn.describe import describe
from forgather_fn.flat import listed
from forgather_fn.hyper import Hyper, Number, Scheduled
from forgather_fn.schedules import Schedule
from forgather_fn.signature import checked

Predicate = Callable[[str, Tensor], bool]


@attrs.frozen
class Group:
    """Which parameters have hyperparameters of their own: made by :func:`group`."""

    match: str | Predicate = attrs.field(repr=describe)
    learning_rate: float | Schedule = attrs.field(repr=describe)
    weight_decay: float | Schedule | None = attrs.field(repr=describe)
    frozen: bool
    name: str

    def schedules(self) -> dict[str, Schedule]:
        """Give those of its hyperparameters that are schedules, by the names of their values."""
        given = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        return {f"{what}/{self.name}": number for what, number in given.items() if callable(number)}


@checked
def group(
    match: str | Predicate,
    *,
    learning_rate: float | Schedule = 1.0,
    weight_decay: float | Schedule | None = None,
    frozen: bool = False,
    name: str | None = None,
) -> Group:
    """Give some parameters hyperparameters of their own. Where several groups match, the first counts.

    A schedule is read at every step. With a factor that is 0 up to some step, the group is *gradually unfrozen*: until
    then its parameters stay as they are to the bit, while the optimizer's averages of their gradients settle.

    Args:
        match: A pattern for the qualified name (``"encoder.*"``, ``"*.bias"``), or a predicate of name and tensor.
        learning_rate: Factor on the scheduled learning rate, or a schedule of it.
        weight_decay: The coefficient, or a schedule of it; None for the optimizer's default.
        frozen: Do not train them.
        name: What its schedules are reported under, ``learning_rate/NAME``; the pattern if not given.

    Raises:
        ValueError: A number is negative or not finite; or, when a state is made, the group matches no parameter.

    Example:
        >>> import torch, forgather_fn as ff
        >>> ff.adamw(groups=[ff.group("head.*", learning_rate=10.0), ff.group("embed.*", frozen=True)]).groups(
        ...     {"embed.weight": torch.zeros(2, 2), "head.weight": torch.zeros(2, 2)}
        ... )["embed.weight"].frozen
        True
        >>> unfrozen = ff.schedules.piecewise(boundaries=(100,), values=(0.0, 1.0))
        >>> ff.adamw(groups=[ff.group("encoder.*", learning_rate=unfrozen)]).schedules
        {'learning_rate/encoder.*': piecewise(boundaries=(100,), values=(0.0, 1.0))}
    """
    check_numbers(learning_rate=learning_rate, weight_decay=weight_decay)
    if name is None:
        name = match if isinstance(match, str) else describe(match)
    return Group(match, learning_rate, weight_decay, frozen, name)


def matrices(name: str, tensor: Tensor) -> bool:
    """Say that tensors of two or more dimensions decay, and others (biases, norms' gains) do not."""
    del name
    return tensor.dim() >= 2


def schedules_of(groups: Sequence[Group], **given: float | Schedule | None) -> dict[str, Schedule]:
    """Collect the schedules among an optimizer's hyperparameters, by the names of their values.

    Raises:
        ValueError: Two groups have schedules of one name; or they are no sequence of groups.
    """
    if not isinstance(groups, Sequence) or not all(isinstance(one, Group) for one in groups):
        raise ValueError(f"groups takes a sequence of them: groups=[ff.group(...)]; got {describe(groups)}")
    found = {name: number for name, number in given.items() if callable(number)}
    for one in groups:
        for name, schedule in one.schedules().items():
            if found.setdefault(name, schedule) is not schedule:
                raise ValueError(f'two groups have schedules for {name!r}; name them: ff.group(..., name="encoder")')
    return found


def named(name: str, number: float | Schedule) -> Number:
    """Put the name of a value in the place of a schedule."""
    return Scheduled(name) if callable(number) else number


def matches(match: str | Predicate, name: str, tensor: Tensor) -> bool:
    """Tell whether a pattern or a predicate chooses a parameter."""
    return fnmatchcase(name, match) if isinstance(match, str) else bool(match(name, tensor))


def assigner(
    groups: Sequence[Group], weight_decay: float | Schedule | None, decays: Predicate
) -> Callable[[Mapping[str, Tensor]], Mapping[str, Hyper]]:
    """Make the function that names each parameter's hyperparameters.

    Raises:
        ValueError: A number is out of range; or, when called, a group matches no parameter.
    """
    check_numbers(weight_decay=weight_decay)
    default = None if weight_decay is None else named("weight_decay", weight_decay)

    def assign(params: Mapping[str, Tensor]) -> Mapping[str, Hyper]:
        chosen: dict[str, Hyper] = {}
        used: set[int] = set()
        for name, tensor in params.items():
            decay = default if default is None or decays(name, tensor) else 0.0
            own = [i for i, one in enumerate(groups) if matches(one.match, name, tensor)]
            used.update(own)
            if not own:
                chosen[name] = Hyper(weight_decay=decay)
                continue
            first = groups[own[0]]
            if first.weight_decay is not None:
                decay = named(f"weight_decay/{first.name}", first.weight_decay)
            rate = named(f"learning_rate/{first.name}", first.learning_rate)
            chosen[name] = Hyper(rate, decay, first.frozen)
        for i, one in enumerate(groups):
            if i not in used:
                raise ValueError(
                    f"group {describe(one.match)} matches no parameter; the parameters are {listed(sorted(params))}"
                )
        return chosen

    return assign


def check_numbers(**numbers: float | Schedule | None) -> None:
    """Make sure that named numbers, where given, are finite and not negative; schedules are checked when read."""
    for name, number in numbers.items():
        if number is not None and not callable(number) and not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {number}")
