"""Reading the tensors of a checkpoint, or the rows of them that a process needs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import safetensors
from torch import Tensor

from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.shards import Rows

UNREADABLE: Final = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading something raises that is not what it should be."""


def rows_of(rows: Rows | None, record: Mapping[str, Any], kind: str, name: str) -> Rows | None:
    """Say how a tensor of a group of files is cut: as parameters are, if it has the shape of one, else not at all."""
    slots = [f"{prefix}/" for prefix in _flat_paths(record["structure"])]
    like_parameter = kind == "ema" or (kind == "model" and name not in record["buffers"])
    return rows if like_parameter or name.startswith(tuple(slots)) else None


def _flat_paths(structure: Any) -> list[str]:
    """Name the slots that have the shapes of the parameters."""
    if isinstance(structure, Mapping):
        own = [structure["flat"]] if isinstance(structure.get("flat"), str) else []
        return own + [path for child in structure.values() for path in _flat_paths(child)]
    return [path for child in structure for path in _flat_paths(child)] if isinstance(structure, list) else []


def read_tensors(path: Path, rows: Callable[[str], Rows | None]) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: Of the file.
        rows: ``name -> rows``: which rows of a tensor are read; None for all.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: _read_rows(file, name, rows(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (safetensors.SafetensorError, *UNREADABLE) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _read_rows(file: Any, name: str, rows: Rows | None) -> Tensor:
    if rows is None:
        tensor: Tensor = file.get_tensor(name)
        return tensor
    held = file.get_slice(name)
    if not held.get_shape():
        raise ValueError(f"{name} is one number, and has no rows")
    own = rows(held.get_shape()[0])
    found: Tensor = held[own] if own.stop > own.start else held[:1][:0]  # it reads no empty slice
    return found
