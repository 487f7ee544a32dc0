"""Several states as one: their tensors side by side, under the names of the members, without a copy.

A joint state is an ordinary one, so that copying, comparing, saving and restoring it need not know of members. Flat
storage of the members becomes one storage of more buffers; what a state has besides lies in mappings by member.
What each member has counted lies in ``controls``.
"""

from collections.abc import Mapping
from typing import Any, Final

import attrs
import torch

from forgather_fn.flat import Flat, Hyper, Layout, Leaf
from forgather_fn.random import key
from forgather_fn.state import COUNTERS, Arrays, TrainState, as_state

MEMBERS: Final = "members"
"""Under which name a joint state's ``controls`` have what is each member's own, and its storage that of the members."""

_HOST: Final = tuple(
    field.name for field in attrs.fields(TrainState) if field.name not in ("seed", "_arrays", "_ownership")
)


def seed_of(seed: int, member: str) -> int:
    """Derive the seed of a member from that of the whole, so that no two members draw the same numbers."""
    return key(seed, "member", member)


def joined(members: Mapping[str, TrainState], before: Arrays | None = None) -> Arrays:
    """Give what is on the device of several states as that of one, which aliases it.

    Args:
        members: By name.
        before: Of the joint state before, whose storage is kept where it is still that of the members, and whose
            controls are.
    """
    every = {name: member.read() for name, member in members.items()}
    stored = None if before is None else (before.params, before.buffers, before.ema)
    averages = {name: arrays.ema for name, arrays in every.items() if arrays.ema is not None}
    own = {
        name: {field: getattr(members[name], field) for field in _HOST}
        | {counter: getattr(arrays, counter) for counter in COUNTERS}
        | {"controls": arrays.controls}
        for name, arrays in every.items()
    }
    counts = {name: torch.stack([getattr(arrays, name) for arrays in every.values()]) for name in COUNTERS}
    arrays = Arrays(
        updates=counts["updates"].sum(),
        skipped=counts["skipped"].sum(),
        tokens=counts["tokens"].sum(),
        nonfinite=counts["nonfinite"].max(),
        params=_side_by_side({name: arrays.params for name, arrays in every.items()}, stored and stored[0]),
        frozen={f"{name}.{n}": tensor for name, arrays in every.items() for n, tensor in arrays.frozen.items()},
        buffers=_side_by_side({name: arrays.buffers for name, arrays in every.items()}, stored and stored[1]),
        opt={name: arrays.opt for name, arrays in every.items()},
        transforms=tuple(arrays.transforms for arrays in every.values()),
        ema=_side_by_side(averages, stored and stored[2]) if averages else None,
        controls={**(before.controls if before else {}), MEMBERS: own},
        loss_scale={name: arrays.loss_scale for name, arrays in every.items() if arrays.loss_scale},  # type: ignore[misc]
    )
    arrays.params.kept["states"] = (arrays, dict(members))
    return arrays


def members(state: TrainState) -> Mapping[str, TrainState]:
    """Give the members of a joint state, which alias it: each is a state of its own program.

    A step consumes those members that it updates.

    Raises:
        ValueError: The state is not one that :func:`~forgather_fn.strategy.joined.joined` made.
        ConsumedStateError: A step has consumed it.
    """
    arrays = as_state(state).read()
    if MEMBERS not in arrays.controls:
        raise ValueError("members: this state is of one model; only those of ff.joined(...) have members")
    found = arrays.params.kept.get("states")
    if found is None or found[0] is not arrays:
        found = arrays.params.kept["states"] = (arrays, _taken_apart(state, arrays))
    return dict(found[1])


def _taken_apart(state: TrainState, arrays: Arrays) -> dict[str, TrainState]:
    own: Mapping[str, Any] = arrays.controls[MEMBERS]
    params, buffers = (apart(flat, tuple(own)) for flat in (arrays.params, arrays.buffers))
    averages = {} if arrays.ema is None else apart(arrays.ema, _owners(arrays.ema))
    states = {}
    for number, (name, kept) in enumerate(own.items()):
        prefix = f"{name}."
        member = Arrays(
            **{counter: kept[counter] for counter in COUNTERS},
            params=params[name],
            frozen={n.removeprefix(prefix): t for n, t in arrays.frozen.items() if n.startswith(prefix)},
            buffers=buffers[name],
            opt=arrays.opt[name],
            transforms=arrays.transforms[number],
            ema=averages.get(name),
            controls=kept["controls"],
            loss_scale=arrays.loss_scale.get(name, {}),  # type: ignore[arg-type]
        )
        host = {field: kept[field] for field in _HOST}
        states[name] = TrainState(seed=seed_of(state.seed, name), arrays=member, **host)
    return states


def _side_by_side(flats: Mapping[str, Flat], before: Flat | None) -> Flat:
    """Join flat storage; give what was there before, if it is of the same members."""
    if before is not None:
        known = before.kept.get(MEMBERS, {})
        if known.keys() == flats.keys() and all(known[name] is flat for name, flat in flats.items()):
            return before
    joint = Flat(
        _joint({name: flat.layout for name, flat in flats.items()}), sum((f.buffers for f in flats.values()), ())
    )
    joint.kept[MEMBERS] = dict(flats)
    return joint


def _joint(layouts: Mapping[str, Layout]) -> Layout:
    leaves: list[Leaf] = []
    groups: list[Hyper] = []
    sizes: list[int] = []
    dtypes: list[torch.dtype] = []
    for name, layout in layouts.items():
        leaves += [
            attrs.evolve(
                leaf, name=f"{name}.{leaf.name}", group=leaf.group + len(groups), buffer=leaf.buffer + len(sizes)
            )
            for leaf in layout.leaves
        ]
        groups += layout.groups
        sizes += layout.sizes
        dtypes += layout.dtypes
    index = {leaf.name: i for i, leaf in enumerate(leaves)}
    elements = sum(layout.elements for layout in layouts.values())
    return Layout(tuple(leaves), tuple(groups), tuple(sizes), tuple(dtypes), index, elements)


def apart(flat: Flat, names: tuple[str, ...]) -> Mapping[str, Flat]:
    """Take joint storage apart again: each member has whole buffers, and groups of its own."""
    if MEMBERS not in flat.kept:
        flat.kept[MEMBERS] = {name: _member(flat, f"{name}.") for name in names}
    found: Mapping[str, Flat] = flat.kept[MEMBERS]
    return found


def _owners(flat: Flat) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.partition(".")[0] for name in flat))


def _member(flat: Flat, prefix: str) -> Flat:
    own = [leaf for leaf in flat.layout.leaves if leaf.name.startswith(prefix)]
    buffers, groups = (sorted({getattr(leaf, of) for leaf in own}) for of in ("buffer", "group"))
    leaves = tuple(
        attrs.evolve(
            leaf,
            name=leaf.name.removeprefix(prefix),
            group=groups.index(leaf.group),
            buffer=buffers.index(leaf.buffer),
        )
        for leaf in own
    )
    layout = Layout(
        leaves=leaves,
        groups=tuple(flat.layout.groups[i] for i in groups),
        sizes=tuple(flat.layout.sizes[i] for i in buffers),
        dtypes=tuple(flat.layout.dtypes[i] for i in buffers),
        index={leaf.name: i for i, leaf in enumerate(leaves)},
        elements=sum(_numel(leaf.shape) for leaf in leaves),
    )
    return Flat(layout, tuple(flat.buffers[i] for i in buffers))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
