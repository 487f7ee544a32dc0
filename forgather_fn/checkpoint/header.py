"""What the header of a safetensors file tells of the file, without reading the tensors."""

import json
import os
from pathlib import Path
from typing import Final

from forgather_fn.checkpoint import system

HEADER_LIMIT: Final = 100_000_000
"""Bytes that a header may have, as in the library."""


def fault(path: Path) -> str | None:
    """Say what is wrong with a safetensors file as far as its header and size tell; None if nothing is."""
    try:
        with system.read_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, HEADER_LIMIT):
                return f"{path.name} is cut short or has no header"
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
        return None if size == expected else f"{path.name} has {size} bytes instead of {expected}"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        return f"{path.name} has no header that can be read: {type(error).__name__}"
