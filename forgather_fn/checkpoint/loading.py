"""Reading checkpoints: whole ones only."""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from forgather_fn.checkpoint import catalog, state_file
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.hashing import comparing
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.checkpoint.reading import UNREADABLE, read_tensors, rows_of
from forgather_fn.checkpoint.snapshot import STATE
from forgather_fn.checkpoint.system import path_of
from forgather_fn.shards import Rows

logger = logging.getLogger(__name__)


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


def load(path: str | Path, rows: Rows | None = None) -> Loaded:
    """Read a checkpoint, or the latest whole one of a run.

    Args:
        path: A ``checkpoint-<step>`` directory, which must be whole; or a run directory, of which the latest whole one
            is taken, and newer ones that are damaged are reported by a warning of the logger.
        rows: Which rows are read of parameters, averages, and slots of their shapes; None for all.

    Raises:
        CheckpointError: There is none, it is damaged, or of a newer version.
    """
    path = path_of(path, "load")
    if (path / manifests.NAME).exists() or (catalog.matched(path) and not (path / catalog.DIRECTORY).exists()):
        return _load(path, rows)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} has no checkpoint that can be loaded: it {'is a file' if path.exists() else 'does not exist'}; "
            "expected a run directory, or a checkpoint-<step> in one"
        )
    problems = []
    for entry in reversed(catalog.list_checkpoints(path)):
        try:
            return _load(entry.path, rows)
        except CheckpointError as error:
            logger.warning("%s is passed over: %s", entry.path, error)
            problems.append(f"{entry.path.name}: {error}")
    reasons = "".join(f"\n  {problem}" for problem in problems)
    raise CheckpointError(f"{path} has no checkpoint that can be loaded{':' if reasons else ''}{reasons}")


def _load(path: Path, rows: Rows | None) -> Loaded:
    try:
        return _read(path, rows)
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _read(path: Path, rows: Rows | None) -> Loaded:
    manifest = manifests.read(path)
    if manifest is None:
        raise CheckpointError(
            f"{path} has no {manifests.NAME}: another tool wrote it, its save did not end, or it is not there"
        )
    _refuse(path, manifests.faults(path, manifest))
    if STATE not in manifest.files:
        raise CheckpointError(f"{path}: its manifest names no {STATE}")
    with comparing(path, {STATE: manifest.files[STATE]}) as wrong:
        _refuse(path, wrong())
    record = state_file.read(path)
    tensors: dict[str, dict[str, Tensor]] = {"model": {}}
    with comparing(path, manifest.files) as wrong:
        for name in manifest.files:
            if name.endswith(".safetensors"):
                kind = name.split(".")[0].split("-")[0]
                held = tensors.setdefault(kind, {})
                held.update(read_tensors(path / name, functools.partial(rows_of, rows, record, kind)))
        _refuse(path, wrong())
    return Loaded(path, record, tensors)


def _refuse(path: Path, faults: Sequence[str]) -> None:
    if faults:
        raise CheckpointError(f"{path} is damaged: {'; '.join(faults)}")
