"""Which optimizer updates which parameters, and with which hyperparameters: to be read before a run."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import attrs
from torch import Tensor, nn

from forgather_fn.describe import describe as text_of
from forgather_fn.hyper import Hyper, Number, Scheduled
from forgather_fn.optim.base import Optimizer, check_optimizer
from forgather_fn.signature import shown


@attrs.frozen
class Row:
    """One parameter.

    Attributes:
        name: Its qualified name.
        shape: Its shape.
        part: Which part of a composed optimizer it is in; empty where that is not composed.
        optimizer: What updates it; empty where it is frozen.
        learning_rate: The factor on the learning rate, as text: a number, or the schedule.
        weight_decay: The same; empty where the optimizer is left to itself.
        frozen: Whether it is not trained.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    optimizer: str
    learning_rate: str
    weight_decay: str
    frozen: bool

    @property
    def group(self) -> tuple[str, ...]:
        """What it has in common with others of its group."""
        if self.frozen:
            return "frozen", "", "", ""
        return self.part or "all", self.optimizer, self.learning_rate, self.weight_decay


@attrs.frozen(repr=False)
class Table:
    """All parameters, in the model's order; printed by group, with names that differ in numbers alone on one line."""

    rows: tuple[Row, ...]

    def groups(self) -> Mapping[tuple[str, ...], Sequence[Row]]:
        """Sort the rows by group: part, optimizer, learning rate, weight decay."""
        found: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found

    def __repr__(self) -> str:
        total = sum(math.prod(row.shape) for row in self.rows)
        return "\n".join([*self._lines(), f"{len(self.rows)} tensors, {total:,} elements"])

    def _lines(self) -> Iterator[str]:
        for (part, optimizer, learning_rate, weight_decay), rows in self.groups().items():
            elements = sum(math.prod(row.shape) for row in rows)
            numbers = (
                f", learning rate x {learning_rate}, weight decay {weight_decay or 'its own'}" if optimizer else ""
            )
            yield f"{part}: {len(rows)} tensors, {elements:,} elements{numbers}"
            if optimizer:
                yield f"  by {optimizer}"
            folded: dict[str, list[str]] = {}
            for row in rows:
                shape = list(row.shape)
                folded.setdefault(f"{_folded(row.name)} {shape}", []).append(f"{row.name} {shape}")
            for pattern, alike in folded.items():
                yield f"    {alike[0]}" if len(alike) == 1 else f"    {pattern} x {len(alike)}"


def _folded(name: str) -> str:
    """Put a star in the place of each part of a name that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def describe(optimizer: Optimizer, params: nn.Module | Mapping[str, Tensor]) -> Table:
    """Say which parameter is in which group: what updates it, and its learning rate and weight decay.

    Args:
        optimizer: Of a plan.
        params: A module, of which parameters that ask for no gradient are frozen; or parameters by name.

    Returns:
        A table that prints; its ``rows`` are data.

    Raises:
        ValueError: What making a state would raise: a group matches nothing, or a parameter has no part.

    Example:
        >>> import forgather_fn as ff
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
        >>> ff.optim.describe(ff.sgd(weight_decay=0.1, groups=[ff.group("2.*", learning_rate=0.5)]), model)
        all: 2 tensors, 21 elements, learning rate x 1.0, weight decay 0.1
          by sgd
            0.weight [3, 4]
            1.weight [3, 3]
        all: 2 tensors, 6 elements, learning rate x 1.0, weight decay 0.0
          by sgd
            *.bias [3] x 2
        all: 1 tensors, 6 elements, learning rate x 0.5, weight decay 0.1
          by sgd
            2.weight [2, 3]
        all: 1 tensors, 2 elements, learning rate x 0.5, weight decay 0.0
          by sgd
            2.bias [2]
        6 tensors, 35 elements
    """
    check_optimizer("describe", optimizer)
    tensors = params.values() if isinstance(params, Mapping) else ()
    if not isinstance(params, nn.Module | Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ValueError(f"describe: params must be a module, or tensors by name; got {shown(params)}")
    named = dict(params.named_parameters()) if isinstance(params, nn.Module) else dict(params)
    still = {n for n, p in named.items() if isinstance(params, nn.Module) and not p.requires_grad}
    hypers = optimizer.groups({name: tensor for name, tensor in named.items() if name not in still})
    rows = [
        _row(optimizer, name, tensor, Hyper(frozen=True) if name in still else hypers[name])
        for name, tensor in named.items()
    ]
    return Table(tuple(rows))


def _row(optimizer: Optimizer, name: str, tensor: Tensor, hyper: Hyper) -> Row:
    own = optimizer
    for part in hyper.part.split("/") if hyper.part else ():
        own = own.parts[part]
    decay = "" if hyper.weight_decay is None else _text(own, hyper.weight_decay)
    by = "" if hyper.frozen else re.sub(r"\(.*", "", repr(own), flags=re.DOTALL)
    rate = _text(own, hyper.learning_rate)
    return Row(name, tuple(tensor.shape), hyper.part, by, rate, decay, hyper.frozen)


def _text(optimizer: Optimizer, number: Number) -> str:
    return text_of(optimizer.schedules[number.name]) if isinstance(number, Scheduled) else repr(number)
