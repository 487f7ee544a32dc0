"""The manifest: the last file of a checkpoint, whose presence says that it is whole."""

import hashlib
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

from forgather_fn.checkpoint import hashing, system
from forgather_fn.checkpoint.hashing import Written

NAME: Final = "manifest.json"
FORMAT: Final = "forgather-fn checkpoint"
VERSION: Final = 2
"""Since 2, files larger than :data:`~forgather_fn.checkpoint.hashing.PIECE` are hashed in pieces."""
LIMIT: Final = 1 << 24
"""Bytes of JSON that are read at most."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, not whole, of a newer version, or does not fit."""


@attrs.frozen(kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: Batches consumed.
        samples: Samples consumed.
        order: How many checkpoints were committed to this run before it; the newest is the one with the greatest.
        run: The id of the run that it belongs to.
        attempt: The id of the process that wrote it.
        time: When it was written, in seconds since 1970.
        files: Each file's size in bytes and sha256, and in which pieces it was hashed.
        metrics: Results known at the time of the save.
        pinned: Whether rotation must leave it.

    The file has a checksum of its own content besides, so that a changed order or name is not believed.
    """

    step: int
    samples: int
    order: int
    run: str
    attempt: str
    time: float
    files: Mapping[str, Written]
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    pinned: bool = False


def dump(manifest: Manifest) -> bytes:
    """Write a manifest as JSON; numbers that JSON has no word for become strings."""
    record = {"format": FORMAT, "version": VERSION, **attrs.asdict(manifest)}
    record["files"] = {name: attrs.asdict(written, filter=_known) for name, written in manifest.files.items()}
    record["metrics"] = {name: _number(value) for name, value in manifest.metrics.items()}
    return json.dumps({**record, "checksum": _checksum(record)}, indent=1, allow_nan=False).encode("utf-8")


def parse(text: bytes, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        CheckpointError: It is not one, its content was changed, or it is of a newer version.
    """
    try:
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise CheckpointError(f"{where}: expected format {FORMAT!r}, got {record['format']!r}")
        if record["version"] > VERSION:
            raise CheckpointError(
                f"{where}: written in version {record['version']} of the format; this library reads up to {VERSION}. "
                "Use a newer one."
            )
        if record.pop("checksum") != _checksum(record):
            raise CheckpointError(f"{where}: its content was changed (its checksum differs)")
        files = {name: _written(f) for name, f in record["files"].items()}
        odd = [name for name in files if not is_plain(name)]
        if odd:
            raise CheckpointError(f"{where}: {odd[0]!r} is not the name of a file in its directory")
        return Manifest(
            step=int(record["step"]),
            samples=int(record["samples"]),
            order=int(record["order"]),
            run=str(record["run"]),
            attempt=str(record["attempt"]),
            time=float(record["time"]),
            files=files,
            metrics={str(name): float(value) for name, value in record["metrics"].items()},
            pinned=bool(record["pinned"]),
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a manifest: {type(error).__name__}: {error}") from None


def _known(field: object, value: object) -> bool:
    return value is not None


def _written(record: Mapping[str, object]) -> Written:
    piece = record.get("piece")
    if piece not in (None, hashing.PIECE):
        raise ValueError(f"a file in pieces of {piece!r} bytes; expected {hashing.PIECE}")
    return Written(int(str(record["size"])), str(record["sha256"]), None if piece is None else hashing.PIECE)


def read(directory: Path) -> Manifest | None:
    """Read the manifest of a directory; None if it has none, so that it was never committed.

    Raises:
        CheckpointError: It is damaged.
    """
    path = directory / NAME
    try:
        with system.read_file(path) as file:
            text = file.read(LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(text) > LIMIT:
        raise CheckpointError(f"{path} is larger than a manifest can be")
    return parse(text, str(path))


def faults(directory: Path, manifest: Manifest) -> list[str]:
    """Compare the files' sizes with the manifest, and name what is missing or of another size."""
    found = []
    for name, written in manifest.files.items():
        try:
            status = (directory / name).stat()
        except OSError:
            found.append(f"{name} is missing")
            continue
        if not stat.S_ISREG(status.st_mode):
            found.append(f"{name} is not a file")
        elif status.st_size != written.size:
            found.append(f"{name} has {status.st_size} bytes instead of {written.size}")
    return found


def hash_faults(directory: Path, manifest: Manifest) -> list[str]:
    """Compare the files' content with the manifest, reading all of it, and name what differs."""
    found = faults(directory, manifest)
    if found:
        return found
    with hashing.comparing(directory, manifest.files) as wrong:
        return wrong()


def _checksum(record: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode("utf-8")).hexdigest()


def is_plain(name: str) -> bool:
    """Tell the name of a file from a path that leads to another directory."""
    return Path(name).name == name and name not in ("", "..") and name.isprintable()


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else repr(float(value))
