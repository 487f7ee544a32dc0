"""Where a model is cut into stages: at the beginning or the end of modules, by their qualified names."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import attrs
from torch import nn

from forgather_fn.flat import listed
from forgather_fn.model import buffer_names, buffer_slots, parameter_sites

Side = Literal["beginning", "end"]
SplitSpec = Mapping[str, Side]

_SIDES: Final = ("beginning", "end")


class SplitError(ValueError):
    """A model cannot be cut into stages as it was asked for."""


@attrs.frozen
class Cut:
    """One place between two stages.

    Attributes:
        name: Of a module.
        side: ``"end"``: the next stage begins after it; ``"beginning"``: it begins with it.
    """

    name: str
    side: Side

    def __str__(self) -> str:
        return f"the {self.side} of {self.name!r}"


@attrs.frozen
class Assignment:
    """Which stages use each tensor of a model.

    Attributes:
        cuts: In their order.
        params: For each parameter, by its first name, the stages that use it; several where it is tied.
        buffers: The same for buffers.
        places: For each place of a parameter in the model, the name of what it holds.
    """

    cuts: tuple[Cut, ...]
    params: Mapping[str, frozenset[int]]
    buffers: Mapping[str, frozenset[int]]
    places: Mapping[str, str] = attrs.field(factory=dict, eq=False)

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.cuts) + 1


def cuts_of(model: nn.Module, spec: SplitSpec) -> tuple[Cut, ...]:
    """Read a ``split_spec``, in the order in which the modules were registered.

    Args:
        model: Whose modules are named.
        spec: For each module at which a stage begins or ends, ``"beginning"`` or ``"end"``.

    Raises:
        SplitError: A name is unknown, a side is neither, two cuts are at one place, or the first or last stage would
            have no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        >>> [str(cut) for cut in cuts_of(model, {"1": "end"})]
        ["the end of '1'"]
        >>> cuts_of(model, {"2": "end"})
        Traceback (most recent call last):
        ...
        forgather_fn.pipeline.cuts.SplitError: split_spec: after the end of '2' no module is left for the last stage
    """
    places = _places(model)
    if not isinstance(spec, Mapping) or not spec:
        raise SplitError(f"split_spec: expected a mapping of modules' names to 'beginning' or 'end', got {spec!r}")
    found: dict[float, Cut] = {}
    for name, side in spec.items():
        if side not in _SIDES:
            raise SplitError(f"split_spec: {name!r} is cut at its 'beginning' or its 'end', not at {side!r}")
        if name not in places:
            near = difflib.get_close_matches(str(name), list(places), n=3) or list(places)[1:6]
            raise SplitError(f"split_spec: the model has no module {name!r}; it has {listed(near)}")
        cut, place = Cut(name, side), places[name][_SIDES.index(side)]
        if place in found:
            raise SplitError(f"split_spec: {found[place]} and {cut} are one place, with no module between them")
        found[place] = cut
    last = len(places) - 1
    for place, cut in found.items():
        if place > last:
            raise SplitError(f"split_spec: after {cut} no module is left for the last stage")
        before = list(places)[: int(place + 0.5)]
        if all(not name or cut.name.startswith(f"{name}.") for name in before):
            raise SplitError(f"split_spec: before {cut} no module is left for the first stage")
    return tuple(found[place] for place in sorted(found))


def _places(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Give, for each module, where it begins and ends in the order of registration."""
    names = [name for name, _ in model.named_modules()]
    inside = [sum(not name or other.startswith(f"{name}.") for other in names) - (not name) for name in names]
    return {name: (i - 0.5, i + inside[i] + 0.5) for i, name in enumerate(names)}


def registered(model: nn.Module, cuts: Sequence[Cut]) -> Assignment:
    """Assign tensors to stages by where their modules were registered: before the first run, the best guess.

    Args:
        model: Whole; its tensors may be on the meta device.
        cuts: As :func:`cuts_of` gives them.
    """
    ends = _places(model)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    bounds = [ends[cut.name][_SIDES.index(cut.side)] for cut in cuts]

    def stage(name: str) -> int:
        return sum(bound < order[name.rpartition(".")[0]] for bound in bounds)

    params: dict[str, set[int]] = {}
    places: dict[str, str] = {}
    for site, name in parameter_sites(model):
        params.setdefault(name, set()).add(stage(site.name))
        places[site.name] = name
    slots = buffer_slots(model)
    buffers: dict[str, set[int]] = {}
    names = buffer_names(slots)
    for slot in slots:  # those without a value too: the first pass may make one
        buffers.setdefault(names.get(slot.name, slot.name), set()).add(stage(slot.name))
    return Assignment(
        tuple(cuts),
        {name: frozenset(stages) for name, stages in params.items()},
        {name: frozenset(stages) for name, stages in buffers.items()},
        places,
    )
