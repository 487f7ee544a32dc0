"""The manifest: the last file of a checkpoint, whose presence says that it is whole."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

from forgather_fn.checkpoint.safe import Written

NAME: Final = "manifest.json"
FORMAT: Final = "forgather-fn checkpoint"
VERSION: Final = 1
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
        files: Each file's size in bytes and sha256.
        metrics: Results known at the time of the save.
        pinned: Whether rotation must leave it.
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
    record = attrs.asdict(manifest)
    record["metrics"] = {name: _number(value) for name, value in manifest.metrics.items()}
    return json.dumps({"format": FORMAT, "version": VERSION, **record}, indent=1, allow_nan=False).encode("utf-8")


def parse(text: bytes, where: str) -> Manifest:
    """Read a manifest.

    Raises:
        CheckpointError: It is not one, or of a newer version.
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
        files = {str(name): Written(int(f["size"]), str(f["sha256"])) for name, f in record["files"].items()}
        if any(Path(name).name != name or name in (".", "..") for name in files):
            raise CheckpointError(f"{where}: a file name leaves the directory")
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
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a manifest: {type(error).__name__}: {error}") from None


def read(directory: Path) -> Manifest | None:
    """Read the manifest of a directory; None if it has none, so that it was never committed.

    Raises:
        CheckpointError: It is damaged.
    """
    path = directory / NAME
    try:
        with path.open("rb") as file:
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
            size = (directory / name).stat().st_size
        except OSError:
            found.append(f"{name} is missing")
            continue
        if size != written.size:
            found.append(f"{name} has {size} bytes instead of {written.size}")
    return found


def hash_faults(directory: Path, manifest: Manifest) -> list[str]:
    """Compare the files' content with the manifest, reading all of it, and name what differs."""
    found = faults(directory, manifest)
    if found:
        return found
    return [
        f"{name}: its content was changed (sha256 differs)"
        for name, written in manifest.files.items()
        if sha256(directory / name) != written.sha256
    ]


def sha256(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else repr(float(value))
