"""Reading checkpoints: whole ones only, into a state that fits them."""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import attrs
import safetensors
import torch
from torch import Tensor

from forgather_fn.checkpoint import catalog
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.checkpoint.record import decode, fill
from forgather_fn.checkpoint.snapshot import STATE, VERSION
from forgather_fn.flat import Flat, filled, layout_of
from forgather_fn.plan import Plan
from forgather_fn.state import Arrays, Ownership, TrainState, counter

logger = logging.getLogger(__name__)

MEANING: Final = ("model", "loss", "optimizer", "schedule", "transforms", "average", "precision", "on_nonfinite")
"""Parts of a plan that must be the same for a run to go on; others are recorded only."""

ALLOWED: Final = frozenset({*MEANING, "data", "batch_size"})
PARTS: Final = frozenset({"optimizer", "ema", "transforms", "controls", "progress"})


@attrs.frozen(eq=False)
class Loaded:
    """What was read of a checkpoint, with every byte compared with the manifest.

    Attributes:
        path: The directory.
        record: ``state.json``.
        tensors: All tensors of each file group: model, optimizer, buffers, ema, other.
    """

    path: Path
    record: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def load(path: str | Path) -> Loaded:
    """Read a checkpoint, or the latest whole one of a run.

    Args:
        path: A ``checkpoint-<step>`` directory, which must be whole; or a run directory, of which the latest whole one
            is taken, and newer ones that are damaged are reported by a warning of the logger.

    Raises:
        CheckpointError: There is none, it is damaged, or of a newer version.
    """
    path = Path(path)
    if (path / manifests.NAME).exists():
        return _load(path)
    if path.name.startswith("checkpoint-"):
        raise CheckpointError(f"{path}: no {manifests.NAME} there: not a checkpoint, or its save did not end")
    problems = []
    for entry in reversed(catalog.list_checkpoints(path)):
        if entry.manifest is None and entry.whole:
            problems.append(f"{entry.path.name}: written by another tool")
            continue
        try:
            return _load(entry.path)
        except CheckpointError as error:
            logger.warning("%s is passed over: %s", entry.path, error)
            problems.append(f"{entry.path.name}: {error}")
    reasons = "".join(f"\n  {problem}" for problem in problems)
    raise CheckpointError(f"{path} has no checkpoint that can be loaded{':' if reasons else ''}{reasons}")


def _load(path: Path) -> Loaded:
    manifest = manifests.read(path)
    if manifest is None:
        raise CheckpointError(f"{path} has no manifest: its save did not end")
    faults = manifests.faults(path, manifest)
    if faults:
        raise CheckpointError(f"{path} is damaged: {'; '.join(faults)}")
    if STATE not in manifest.files:
        raise CheckpointError(f"{path}: its manifest names no {STATE}")
    tensors: dict[str, dict[str, Tensor]] = {}
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="checkpoint") as pool:
        hashes = {name: pool.submit(manifests.sha256, path / name) for name in manifest.files}
        for name in manifest.files:
            if name.endswith(".safetensors"):
                group = tensors.setdefault(name.split(".")[0].split("-")[0], {})
                group.update(_read_tensors(path / name))
        changed = [name for name, found in hashes.items() if found.result() != manifest.files[name].sha256]
    if changed:
        raise CheckpointError(f"{path} is damaged: the content of {', '.join(changed)} was changed (sha256 differs)")
    record = json.loads((path / STATE).read_bytes())
    if record["version"] > VERSION:
        raise CheckpointError(f"{path}: {STATE} is of version {record['version']}; this library reads up to {VERSION}")
    return Loaded(path, record, tensors)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def restored(
    plan: Plan,
    fresh: Callable[[int], TrainState],
    path: str | Path,
    allow: Collection[str],
    without: Collection[str],
) -> TrainState:
    """Make the state that a checkpoint holds; see :class:`~forgather_fn.plan.Restore`."""
    _check_names("allow", allow, ALLOWED)
    _check_names("without", without, PARTS)
    loaded = load(path)
    record = loaded.record
    _check_plan(plan, record["plan"], loaded.path, allow)
    state = fresh(int(record["seed"]))
    try:
        arrays = _arrays(state.read(), loaded, without, plan.device)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{loaded.path}: {STATE} cannot be read: {type(error).__name__}: {error}") from None
    state = attrs.evolve(state, arrays=arrays)
    if "progress" in without:
        return state
    return attrs.evolve(
        state,
        step=int(record["step"]),
        samples=int(record["samples"]),
        data=None if "data" in allow else record["data"],
        batch_size=None if "batch_size" in allow else record["batch_size"],
    )


def _check_names(what: str, given: Collection[str], known: frozenset[str]) -> None:
    unknown = sorted(set(given) - known)
    if isinstance(given, str) or unknown:
        raise ValueError(f"restore: {what}={given!r}: expected a set of names out of {sorted(known)}")


def _check_plan(plan: Plan, saved: Mapping[str, str], path: Path, allow: Collection[str]) -> None:
    here = plan.describe()
    unlike = [name for name in MEANING if name not in allow and saved.get(name) != here[name]]
    if unlike:
        lines = "".join(f"\n  {name}:\n    saved: {saved.get(name)}\n    here:  {here[name]}" for name in unlike)
        raise CheckpointError(
            f"{path} was made by another plan:{lines}\nUse the plan that it was made by, or go on with this one on "
            f"purpose: restore(..., allow={set(unlike)!r})"
        )


def _arrays(fresh: Arrays, loaded: Loaded, without: Collection[str], device: torch.device) -> Arrays:
    model = dict(loaded.tensors["model"])
    buffers = _buffers(fresh.buffers, loaded, model, device)
    _fill_model(fresh, model)
    record = loaded.record
    if "progress" not in without:
        for name, value in record["counters"].items():
            getattr(fresh, name).copy_(counter(int(value), device))
    structure, kept = record["structure"], {}
    for name, group in (("opt", "optimizer"), ("transforms", "other"), ("controls", "other")):
        if {"opt": "optimizer"}.get(name, name) not in without:
            found = loaded.tensors.get(group, {})
            kept[name] = decode(structure[name], found, getattr(fresh, name), device, f"{loaded.path}: {name}")
    if "ema" not in without and fresh.ema is not None:
        if not record["ema"]:
            raise CheckpointError(f"{loaded.path} holds no average of the parameters; leave it out: without={{'ema'}}")
        fill(fresh.ema, loaded.tensors["ema"], "ema")
    return attrs.evolve(fresh, buffers=buffers, **kept)


def _buffers(fresh: Flat, loaded: Loaded, model: dict[str, Tensor], device: torch.device) -> Flat:
    """Take the buffers out of what was read, in the shapes that they had when they were saved."""
    aside = loaded.tensors.get("buffers", {})
    names = loaded.record["buffers"]
    values = {name: model.pop(name) if name in model else aside[name] for name in names}
    same = {n: (t.shape, t.dtype) for n, t in values.items()} == {n: (t.shape, t.dtype) for n, t in fresh.items()}
    if same:
        fill(fresh, values, "buffers")
        return fresh
    return filled(layout_of(values), values, device)


def _fill_model(fresh: Arrays, model: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(model) - set(fresh.params) - set(fresh.frozen))
    missing = sorted({*fresh.params, *fresh.frozen} - set(model))
    if unknown or missing:
        raise CheckpointError(
            f"the checkpoint is of another model: it lacks {missing[:5]} and has {unknown[:5]} besides"
        )
    fill(fresh.params, {name: model[name] for name in fresh.params}, "params")
    for name, tensor in fresh.frozen.items():
        if (tensor.shape, tensor.dtype) != (model[name].shape, model[name].dtype):
            raise CheckpointError(f"frozen/{name}: expected {tuple(tensor.shape)}, got {tuple(model[name].shape)}")
        tensor.copy_(model[name])


def load_weights(
    state: TrainState, path: str | Path, *, select: Callable[[str], bool] = lambda name: True
) -> TrainState:
    """Take weights, and nothing else, out of a checkpoint: to start a new run from them.

    Args:
        state: A fresh state, which is consumed.
        path: As in :func:`load`.
        select: Which parameters, by name; others keep their values.

    Returns:
        The state with these weights.

    Raises:
        CheckpointError: A selected parameter is missing there, or has another shape; or none is selected.
    """
    model = load(path).tensors["model"]
    chosen = [name for name in state.params if select(name)]
    missing = [name for name in chosen if name not in model]
    if missing or not chosen:
        reason = f"{path} has no {missing[:5]}" if missing else "select chose no parameter"
        raise CheckpointError(f"load_weights: {reason}")
    arrays = state.consume("load_weights")
    fill(arrays.params, {**arrays.params, **{name: model[name] for name in chosen}}, "params")
    return attrs.evolve(state, arrays=arrays, ownership=Ownership())
