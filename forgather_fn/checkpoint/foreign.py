"""What lies beside weights as JSON, by whatever tool: of a bounded size, and naming files of its own directory."""

import json
import os
from pathlib import Path
from typing import Any, Final

from forgather_fn.checkpoint import system
from forgather_fn.checkpoint.manifest import CheckpointError, is_plain

LIMIT: Final = 1 << 28
"""Bytes of the largest file of JSON that is read: the logs of a long run are some tens of millions."""


def read_json(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        CheckpointError: It is too large, or no JSON.
        OSError: It cannot be read, or is no file.
    """
    with system.read_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LIMIT:
            raise CheckpointError(f"{path} has {size:,} bytes, more than the {LIMIT:,} that are read of such a file")
        text = file.read(LIMIT)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {str(error)[:200]}") from None


def files_of(index: Path) -> list[str]:
    """Name the files that an index says weights lie in, ``*.index.json`` as transformers writes it.

    Raises:
        CheckpointError: It is no index, or names what is no file of its own directory.
        OSError: It cannot be read, or is no file.
    """
    record = read_json(index)
    found = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{index} is no index of weights: expected a weight_map of parameters to names of files")
    names = sorted(set(found.values()))
    odd = [name for name in names if not is_plain(name)]
    if odd:
        raise CheckpointError(f"{index}: {odd[0][:100]!r} is not the name of a file in its directory")
    return names
