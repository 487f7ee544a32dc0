"""What trackers of experiments have in common: a run that goes on under its id, and that ends as the training does."""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import attrs

from forgather_fn.reports.path import checked, content_of, naming, replace
from forgather_fn.reports.row import Row, Sink, opened

IDS: Final = "trackers.json"
"""The file of a run's directory that has the id of its tracked run, by the name of the tracker."""


class Log(Protocol):
    """Log numbers to a tracked run."""

    def __call__(self, step: int, numbers: Mapping[str, float], /) -> None:
        """Log them at a step."""
        ...


class End(Protocol):
    """End a tracked run."""

    def __call__(self, failed: bool, /) -> None:
        """Send what is pending, and say whether the training ended by an exception."""
        ...


@attrs.frozen(eq=False)
class TrackedRun:
    """A run that a tracker keeps: its id, and the two things that are done with it."""

    id: str
    log: Log
    end: End


class Begin(Protocol):
    """Begin a tracked run."""

    def __call__(self, package: Any, known: str | None, /) -> TrackedRun:
        """Go on with the run that is known by an id; begin a new one where it is None.

        Args:
            package: The tracker's own, imported.
            known: The id that an attempt before had.
        """
        ...


def tracked(package: str, requirement: str, directory: str | os.PathLike[str], begin: Begin) -> Sink:
    """Make a sink of a tracker of experiments.

    The id of the tracked run is kept in the run's directory, in ``trackers.json``. An attempt that was restored
    (``row.started > 0``) goes on with the run of that id; one that starts from the beginning begins another.

    Args:
        package: What is imported at the first row.
        requirement: What pip installs for it.
        directory: The directory of the run; created with its parents at the first row.
        begin: Begins a run.

    Raises:
        ValueError: The package is not installed. At the first row: it cannot be imported; the directory cannot be used.
    """
    top = package.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise ValueError(f"{top} is not installed, and is no dependency of this library: pip install '{requirement}'")
    checked(directory, top)
    outer = None

    def open(row: Row) -> TrackedRun:
        nonlocal outer
        outer = sys.exception()
        try:
            library = importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"{top} cannot be imported ({error}): pip install '{requirement}'") from error
        ids = _read(directory)
        run = begin(library, ids.get(top) if row.started else None)
        try:
            _write(directory, {**ids, top: run.id})
        except BaseException:
            run.end(True)
            raise
        return run

    def write(run: TrackedRun, row: Row) -> None:
        epoch = {} if row.epoch is None else {"epoch": row.epoch}
        run.log(row.step, {"samples": float(row.samples), **epoch, **row.values})

    def close(run: TrackedRun) -> None:
        # A stream that control ends is closed by GeneratorExit; an exception that was there before is another's.
        error = sys.exception()
        run.end(error is not None and error is not outer and not isinstance(error, GeneratorExit))

    return opened(f"{top}({os.fspath(directory)!r})", open, write, close)


def _read(directory: str | os.PathLike[str]) -> dict[str, str]:
    path = Path(directory) / IDS
    with naming(directory, "the directory of a run, or a new one in a directory that can be written to"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path, "the file of the ids of tracked runs, or none"):
        content = content_of(path) if path.exists() else b"{}"
    try:
        ids = json.loads(content)
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, dict) or not all(isinstance(one, str) for one in ids.values()):
        shown = content[:80].decode(errors="replace")
        raise ValueError(f"{path}: expected a JSON object with the ids of tracked runs, got {shown!r}; remove it")
    return ids


def _write(directory: str | os.PathLike[str], ids: Mapping[str, str]) -> None:
    path = Path(directory) / IDS
    with naming(path, "a file that can be written"):
        replace(path, (json.dumps(ids, indent=2) + "\n").encode())
