"""Finding checkpoints: which there are, which are whole, and which is the latest."""

import logging
import re
from pathlib import Path

import attrs

from forgather_fn.checkpoint import foreign, header, system
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.manifest import CheckpointError, Manifest

logger = logging.getLogger(__name__)

DIRECTORY = "checkpoints"
"""Where, in the run directory, its checkpoints lie."""
RECORD = "record.json"
"""A file that says how a run was made: where its directory has one, each of its checkpoints has a copy."""
RECORD_LIMIT = 1 << 26
"""Bytes of a record that are copied at most."""

_NAME = re.compile(r"checkpoint-(\d+)")
ASIDE = re.compile(r"\.replaced-checkpoint-(\d+)-[0-9a-f]+")
TEMPORARY = re.compile(r"\.(tmp|trash)-checkpoint-\d+-[0-9a-f]+")
"""What a save that did not end, or a rotation, leaves behind."""


@attrs.frozen
class Entry:
    """A directory that is, or looks like, a checkpoint.

    Attributes:
        path: The directory.
        step: By its name.
        manifest: None for one that another tool wrote, or that is not whole.
        faults: Why it cannot be used; empty if it can, as far as sizes tell.
    """

    path: Path
    step: int
    manifest: Manifest | None
    faults: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether it was committed and its files have their sizes."""
        return not self.faults


def list_checkpoints(run: str | Path) -> list[Entry]:
    """List what looks like a checkpoint of a run, oldest first, in the order in which they were committed.

    Those that other tools wrote have no manifest: their place is by modification time, and they are checked as far as
    their files allow. Those whose manifest cannot be read stand last: any of them may be the newest.

    Args:
        run: The run directory, or the directory that the checkpoints lie in.
    """
    entries = [entry(path) for path in _candidates(root(run)) if matched(path)]
    found = sorted((e for e in entries if e.manifest), key=lambda e: e.manifest.order if e.manifest else 0)
    unread = [e for e in entries if not e.manifest and (e.path / manifests.NAME).exists()]
    others = [e for e in entries if not e.manifest and e not in unread]
    for other in sorted(others, key=lambda e: (_time(e), e.step)):
        older = [i for i, e in enumerate(found) if _time(e) <= _time(other)]
        found.insert(max(older, default=-1) + 1, other)
    return found + sorted(unread, key=lambda e: e.step)


def _time(entry: Entry) -> float:
    """Tell when a checkpoint was written: by its manifest, or by the file system."""
    if entry.manifest:
        return entry.manifest.time
    try:
        return entry.path.stat().st_mtime
    except OSError:  # it was removed just now
        return 0.0


def latest(run: str | Path) -> Entry | None:
    """Find the whole checkpoint that was committed last; None if there is none.

    Newer ones that are damaged are reported by a warning of the logger.
    """
    for found in reversed(list_checkpoints(run)):
        if found.whole:
            return found
        logger.warning("%s is passed over: %s", found.path, "; ".join(found.faults))
    return None


def verify(path: str | Path) -> list[str]:
    """Read every byte of a checkpoint and compare it with its manifest.

    Returns:
        What is wrong, empty if nothing is.
    """
    path = system.path_of(path, "verify")
    try:
        manifest = manifests.read(path)
    except (CheckpointError, OSError) as error:
        return [str(error)]
    return ["it has no manifest: the save did not end"] if manifest is None else manifests.hash_faults(path, manifest)


def added(checkpoint: Entry) -> list[str]:
    """Name the files that lie in a checkpoint and are not its own."""
    known = {manifests.NAME, *(checkpoint.manifest.files if checkpoint.manifest else ())}
    return sorted(path.name for path in checkpoint.path.iterdir() if path.name not in known)


def root(run: str | Path) -> Path:
    """Give the directory that holds the checkpoints of a run."""
    run = system.path_of(run, "checkpoints")
    return run / DIRECTORY if (run / DIRECTORY).is_dir() or not _holds_checkpoints(run) else run


def _holds_checkpoints(path: Path) -> bool:
    return path.is_dir() and any(_NAME.fullmatch(child.name) for child in path.iterdir())


def _candidates(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def matched(path: Path) -> re.Match[str] | None:
    """Tell whether a path has the name of a checkpoint; the match's first group is the step."""
    return _NAME.fullmatch(path.name) or ASIDE.fullmatch(path.name)


def entry(path: Path) -> Entry:
    """Look at one directory that has the name of a checkpoint."""
    match = matched(path)
    step = int(match[1]) if match else 0
    try:
        manifest = manifests.read(path)
    except (CheckpointError, OSError) as error:
        return Entry(path, step, None, (str(error),))
    if manifest is not None:
        return Entry(path, step, manifest, tuple(manifests.faults(path, manifest)))
    return Entry(path, step, None, _foreign_faults(path))


def _foreign_faults(path: Path) -> tuple[str, ...]:
    """Check a directory that another tool wrote, as transformers.Trainer does: its state file, and the weights."""
    try:
        foreign.read_json(path / "trainer_state.json")
    except (OSError, CheckpointError) as error:
        return (f"it has no manifest and no trainer_state.json that can be read: {type(error).__name__}",)
    try:
        index = path / "model.safetensors.index.json"
        shards = foreign.files_of(index) if index.exists() else ["model.safetensors"]
        return tuple(fault for name in shards if (fault := header.fault(path / name)))
    except (OSError, CheckpointError) as error:
        return (f"its weights' index cannot be read: {error}",)
