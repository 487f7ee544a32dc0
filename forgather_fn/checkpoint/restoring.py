"""Putting what a checkpoint holds into a state that fits it."""

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor

from forgather_fn.checkpoint.loading import Loaded, load
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.checkpoint.record import decode, fill
from forgather_fn.checkpoint.snapshot import STATE
from forgather_fn.checkpoint.system import path_of
from forgather_fn.flat import Flat, filled, layout_of, listed
from forgather_fn.joining import MEMBERS, members
from forgather_fn.optim.base import OptState, rewrite
from forgather_fn.plan import Plan
from forgather_fn.portion import Portion
from forgather_fn.shards import Rows
from forgather_fn.state import COUNTERS, RESTARTABLE, Arrays, Ownership, TrainState, check_names, counter
from forgather_fn.world import World, check_same

logger = logging.getLogger(__name__)

MEANING: Final = ("model", "loss", "optimizer", "schedule", "transforms", "average", "precision", "on_nonfinite")
"""Parts of a plan that must be the same for a run to go on; others are recorded only."""

ALLOWED: Final = frozenset({*MEANING, "data", "batch_size"})


def restored(
    plan: Plan,
    fresh: Callable[[int], TrainState],
    world: World,
    portion: Callable[[], Portion | None],
    path: str | Path,
    allow: Collection[str],
    without: Collection[str],
    rows: Rows | None = None,
) -> TrainState:
    """Make the state that a checkpoint holds; see :class:`~forgather_fn.program.Restore`."""
    check_names("restore: allow", allow, ALLOWED)
    check_names("restore: without", without, RESTARTABLE)
    loaded = _loaded_together(world, path, rows)
    record = loaded.record
    _tell_of_other_world(world, record, loaded.path)
    with _explained(loaded.path):
        _check_plan(plan, record["plan"], loaded.path, allow)
        seed = int(record["seed"])
    state = fresh(seed)
    own = portion()
    if own is not None:
        from forgather_fn.checkpoint.shards import portion_of  # when used: it writes as well

        loaded = portion_of(loaded, own)
    with _explained(loaded.path):
        state = attrs.evolve(state, arrays=_arrays(plan, state.read(), loaded, without))
        if "progress" in without:
            return state
        return attrs.evolve(
            state,
            step=int(record["step"]),
            samples=int(record["samples"]),
            data=None if "data" in allow else record["data"],
            batch_size=None if "batch_size" in allow else record["batch_size"],
            cursor=None if "data" in allow else record.get("cursor"),
        )


def _loaded_together(world: World, path: str | Path, rows: Rows | None) -> Loaded:
    """Read, on every process, what the first one has found to be whole."""
    found: list[Loaded] = []

    def first() -> Path:
        found.append(load(path, rows))
        return found[0].path

    check_same(world.gather(os.path.abspath(path_of(path, "load"))), _UNLIKE)
    chosen = world.first(first)
    world.each(lambda: None if found else found.append(load(chosen, rows)))
    return found[0]


_UNLIKE: Final = "the processes of a run load together, from one path: leave the rank out of it. They were given:"


def _tell_of_other_world(world: World, record: Mapping[str, Any], path: Path) -> None:
    before = record.get("world", 1)
    if before != world.size and world.main:
        logger.info(
            "%s was saved by %s processes, and goes on with %s: a step keeps its batch and its microbatches, of which "
            "each process has another share; the numbers are the same",
            path,
            before,
            world.size,
        )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {STATE} cannot be read: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _refused(part: str) -> Iterator[None]:
    """Say of what does not fit how a run goes on without it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}. To let this part begin afresh: restore(..., without={{{part!r}}})") from error


def _check_plan(plan: Plan, saved: Mapping[str, str], path: Path, allow: Collection[str]) -> None:
    here = plan.describe()
    unlike = [name for name in MEANING if name not in allow and saved.get(name) != here[name]]
    if unlike:
        lines = "".join(f"\n  {name}:\n    saved: {saved.get(name)}\n    here:  {here[name]}" for name in unlike)
        raise CheckpointError(
            f"{path} was made by another plan:{lines}\nUse the plan that it was made by, or go on with this one on "
            f"purpose: restore(..., allow={set(unlike)!r})"
        )


def _arrays(plan: Plan, fresh: Arrays, loaded: Loaded, without: Collection[str]) -> Arrays:
    """Put what was read into the storage of a fresh state: what a module stands on last, when nothing can fail."""
    device, record = plan.device, loaded.record
    model = dict(loaded.tensors["model"])
    buffers = _buffer_values(loaded, model)
    _check_model(fresh, model, loaded.path)  # first: slots that do not fit are so because their parameters do not
    kept: dict[str, Any] = {}
    for name, part, group in _SLOTS if _both_scaled(fresh, record) else _SLOTS[:-1]:
        if part not in without:
            found = loaded.tensors.get(group, {})
            with _refused(part):
                kept[name] = decode(
                    record["structure"][name], found, getattr(fresh, name), device, f"{loaded.path}: {name}"
                )
    saved = len(kept.get("transforms", fresh.transforms))
    if saved != len(fresh.transforms):
        raise CheckpointError(
            f"{loaded.path} was saved with {saved} transforms, and the plan has {len(fresh.transforms)}: let them "
            "begin with fresh states, without={'transforms'}"
        )
    if "ema" not in without and fresh.ema is not None:
        if not record["ema"]:
            raise CheckpointError(f"{loaded.path} holds no average of the parameters; leave it out: without={{'ema'}}")
        fill(fresh.ema, loaded.tensors.get("ema", {}), f"{loaded.path}: ema")
    if "progress" not in without:
        for name in COUNTERS:
            getattr(fresh, name).copy_(counter(int(record["counters"][name]), device))
    fill(fresh.params, {name: model[name] for name in fresh.params}, f"{loaded.path}: params")
    if fresh.ema is not None and "ema" in without:
        fresh.ema.assign(fresh.params)
    if "optimizer" in without:
        kept["opt"] = plan.optimizer.init(fresh.params)
    if "transforms" in without:
        kept["transforms"] = tuple(transform.init(fresh.params) for transform in plan.transforms)
    frozen = {name: _shared(tensor, model[name]) for name, tensor in fresh.frozen.items()}
    return attrs.evolve(fresh, frozen=frozen, buffers=_buffers(fresh.buffers, buffers, device), **kept)


_SLOTS: Final = (
    ("opt", "optimizer", "optimizer"),
    ("transforms", "transforms", "other"),
    ("controls", "controls", "other"),
    ("loss_scale", "loss_scale", "other"),
)
"""Parts of a state that are trees: the field, what ``without`` calls it, and the group of files with its tensors."""


def _both_scaled(fresh: Arrays, record: Mapping[str, Any]) -> bool:
    """Tell whether there is a loss scale to go on with: a run that was in another precision has none."""
    saved = record["structure"].get("loss_scale", {}).get("mapping")
    return bool(fresh.loss_scale and saved)


def _buffer_values(loaded: Loaded, model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the buffers out of what was read; persistent ones lie beside the weights."""
    aside = loaded.tensors.get("buffers", {})
    names = dict.fromkeys(loaded.record["buffers"])
    missing = [name for name in names if name not in model and name not in aside]
    if missing:
        raise CheckpointError(f"{loaded.path}: its files lack the buffers {listed(missing)}")
    return {name: model.pop(name) if name in model else aside[name] for name in names}


def _buffers(fresh: Flat, values: Mapping[str, Tensor], device: torch.device) -> Flat:
    """Store buffers, in the shapes that they had when they were saved."""
    same = {n: (t.shape, t.dtype) for n, t in values.items()} == {n: (t.shape, t.dtype) for n, t in fresh.items()}
    if same:
        fill(fresh, values, "buffers")
        return fresh
    return filled(layout_of(values), values, device)


def _check_model(fresh: Arrays, model: Mapping[str, Tensor], path: Path) -> None:
    here = {**fresh.params, **fresh.frozen}
    unknown, missing = sorted(set(model) - set(here)), sorted(set(here) - set(model))
    if unknown or missing:
        raise CheckpointError(
            f"{path} was made by another model: it lacks {listed(missing)}, and has {listed(unknown)} besides"
        )
    _check_kinds(here, model, path)


def _check_kinds(here: Mapping[str, Tensor], model: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in here.items():
        found = model[name]
        if (tensor.shape, tensor.dtype) != (found.shape, found.dtype):
            raise CheckpointError(
                f"{path}: {name} is {tuple(found.shape)} {found.dtype} there, and {tuple(tensor.shape)} {tensor.dtype} "
                "in this model"
            )


def _shared(mine: Tensor, found: Tensor) -> Tensor:
    """Keep a frozen parameter, which other states share, unless the checkpoint has other values."""
    same = torch.equal(mine.cpu().reshape(-1).view(torch.uint8), found.reshape(-1).view(torch.uint8))
    return mine if same else torch.empty_like(mine).copy_(found)


def load_weights(
    state: TrainState, path: str | Path, *, select: Callable[[str], bool] = lambda name: True
) -> TrainState:
    """Take the model out of a checkpoint, and nothing else: to start a new run from its weights.

    Args:
        state: A fresh state, which is consumed. An average that it keeps starts from the weights, and so
            do the copies of parameters that optimizers keep.
        path: As in :func:`load`.
        select: Which parameters, frozen ones among them, and which persistent buffers, by name; others keep their
            values.

    Returns:
        The state with these weights.

    Raises:
        CheckpointError: A selected one is missing there, or has another shape; or none is selected. The state is not
            consumed then.
    """
    if not isinstance(state, TrainState):
        raise ValueError(f"load_weights takes a state, and the path of a checkpoint; got {type(state).__name__}")
    if not callable(select):
        raise ValueError(f"load_weights: select={select!r}: expected a function of a name that gives true or false")
    loaded = load(path)
    model, arrays = loaded.tensors["model"], state.read()
    aside = set(loaded.tensors.get("buffers", ()))
    held = {**arrays.params, **arrays.frozen, **{n: t for n, t in arrays.buffers.items() if n not in aside}}
    chosen = {name: tensor for name, tensor in held.items() if select(name)}
    missing = sorted(set(chosen) - set(model))
    if missing or not chosen:
        reason = f"{loaded.path} has no {listed(missing)}" if missing else "select chose nothing"
        raise CheckpointError(f"load_weights: {reason}. The model here has {listed(sorted(held))}")
    _check_kinds(chosen, model, loaded.path)
    owners = _optimizers(state)
    arrays = state.consume("load_weights")
    averages = arrays.ema if arrays.ema is not None else {}
    with torch.no_grad():
        for name in chosen:
            for flat in (arrays.params, arrays.buffers, averages):
                if name in flat:
                    flat[name].copy_(model[name])
        for prefix, opt in owners:
            rewrite(opt, {n.removeprefix(prefix): model[n] for n in chosen if n.startswith(prefix)})
    frozen = {n: _shared(t, model[n]) if n in chosen else t for n, t in arrays.frozen.items()}
    return attrs.evolve(state, arrays=attrs.evolve(arrays, frozen=frozen), ownership=Ownership())


def _optimizers(state: TrainState) -> list[tuple[str, OptState]]:
    """Give what optimizers keep, with what the names of their parameters begin with: one, or one for each member."""
    if MEMBERS in state.controls:
        return [(f"{name}.", member.opt) for name, member in members(state).items()]
    return [("", state.opt)]
