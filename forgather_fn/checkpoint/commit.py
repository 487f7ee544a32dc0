"""The commit of a checkpoint: it is there, whole and on the disk, or it is not.

    write every file into a temporary sibling and sync it; the manifest last; sync the directory
    rename it to checkpoint-<step>; sync the parent                                     <- the commit

Where a checkpoint of that step exists (the run went back), it is first renamed aside, and removed after the commit; the
one aside is found as well, so that there is no instant without a whole one.
"""

import contextlib
import errno
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from forgather_fn.checkpoint import catalog, system
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.catalog import RECORD, RECORD_LIMIT
from forgather_fn.checkpoint.hashing import Written, hashed
from forgather_fn.checkpoint.manifest import Manifest
from forgather_fn.checkpoint.rotation import Policy, superseded
from forgather_fn.checkpoint.safe import write_file, write_tensors
from forgather_fn.checkpoint.snapshot import Snapshot

logger = logging.getLogger(__name__)

WRITERS: Final = 2
"""Files that are written at the same time: hashing one and writing another take different parts of the machine."""


@attrs.frozen
class Session:
    """One process that writes to a run.

    Attributes:
        directory: Where checkpoints lie.
        run: The id of the run; that of the newest checkpoint, if there is one.
        attempt: The id of this process's attempt.
    """

    directory: Path
    run: str
    attempt: str


def open_session(run: Path) -> Session:
    """Make ready to save to a run, under its lock: what earlier saves left half done is removed.

    Raises:
        OSError: The directory cannot be made, or written to.
    """
    directory = run / catalog.DIRECTORY
    system.make_path(directory)
    system.sync_directory(run)
    entries = catalog.list_checkpoints(directory)
    known = [entry.manifest.run for entry in entries if entry.manifest]
    sweep(directory)
    return Session(directory, known[-1] if known else secrets.token_hex(8), secrets.token_hex(8))


def recorded(directory: Path) -> bytes | None:
    """Read what a run says of how it was made, if it does.

    Args:
        directory: Where its checkpoints lie: the run's own, or ``checkpoints`` in it.

    Raises:
        ValueError: It is larger than a record may be.
    """
    run = directory.parent if directory.name == catalog.DIRECTORY else directory
    path = run / RECORD
    if not path.is_file():
        return None
    if path.stat().st_size > RECORD_LIMIT:
        raise ValueError(f"{path} is larger than a record of a run may be: {RECORD_LIMIT:,} bytes")
    return path.read_bytes()


def sweep(directory: Path) -> None:
    """Remove what saves that did not end have left; a checkpoint that was moved aside for one comes back.

    What cannot be removed is reported by a warning of the logger: it takes space, and is in nobody's way.
    """
    for path in sorted(directory.iterdir()):
        with _tolerated(path):
            if catalog.TEMPORARY.fullmatch(path.name):
                system.remove_tree(path)
            elif aside := catalog.ASIDE.fullmatch(path.name):
                _settle(path, directory / f"checkpoint-{aside[1]}")


def _settle(aside: Path, home: Path) -> None:
    if not home.exists():
        system.rename(aside, home)
        system.sync_directory(home.parent)
    elif not catalog.entry(home).faults:
        discard(aside)


def commit(session: Session, snapshot: Snapshot, *, pinned: bool = False) -> Path:
    """Write a snapshot as a checkpoint of the run.

    Args:
        session: Of this process, which holds the run's lock.
        snapshot: With its values copied.
        pinned: Whether rotation must leave it.

    Returns:
        The directory.

    Raises:
        OSError: It could not be written; what was there before is as it was.
    """
    if (record := recorded(session.directory)) is not None:
        snapshot = attrs.evolve(snapshot, texts={**snapshot.texts, RECORD: record})
    sweep(session.directory)
    check_space(session.directory, snapshot)
    token = secrets.token_hex(4)
    home = session.directory / f"checkpoint-{snapshot.step}"
    temporary = session.directory / f".tmp-checkpoint-{snapshot.step}-{token}"
    try:
        system.make_directory(temporary, 0o700)
        files = _write_files(temporary, snapshot)
        manifest = _manifest(session, snapshot, files, pinned)
        write_file(temporary / manifests.NAME, iter([memoryview(manifests.dump(manifest))]))
        system.sync_directory(temporary)
        _move_in(session.directory, temporary, home, token)
    except BaseException:
        with contextlib.suppress(OSError):
            system.remove_tree(temporary)
        raise
    return home


def seal(
    session: Session,
    temporary: Path,
    *,
    step: int,
    samples: int,
    metrics: Mapping[str, float] | None = None,
    pinned: bool = False,
) -> Path:
    """Commit a directory that others have written: sync its files, write the manifest last, and move it in.

    Args:
        session: Of this process, which holds the run's lock.
        temporary: In the session's directory, named as :func:`staged` names it.
        step: Of the checkpoint.
        samples: Consumed by the job.
        metrics: Results known at this step.
        pinned: Whether rotation must leave it.

    Returns:
        The directory ``checkpoint-<step>``.

    Raises:
        OSError: It could not be written; what was there before is as it was.
    """
    if (record := recorded(session.directory)) is not None:
        (temporary / RECORD).write_bytes(record)
    files = {path.name: _synced(path) for path in sorted(temporary.iterdir()) if path.is_file()}
    for directory, _, names in os.walk(temporary):  # what lies deeper is on the disk too, but not checked later
        if Path(directory) != temporary:
            for name in names:
                _synced(Path(directory) / name)
            system.sync_directory(Path(directory))
    taken = Snapshot(step, samples, {}, {}, metrics or {})
    manifest = _manifest(session, taken, files, pinned)
    write_file(temporary / manifests.NAME, iter([memoryview(manifests.dump(manifest))]))
    system.sync_directory(temporary)
    home = session.directory / f"checkpoint-{step}"
    _move_in(session.directory, temporary, home, secrets.token_hex(4))
    return home


def staged(session: Session, step: int) -> Path:
    """Make a directory in which a checkpoint can be written, until :func:`seal` commits it or a sweep removes it."""
    path = session.directory / f".tmp-checkpoint-{step}-{secrets.token_hex(4)}"
    system.make_directory(path, 0o755)
    return path


def _synced(path: Path) -> Written:
    file = os.open(path, os.O_RDONLY)
    try:
        system.sync(file)
    finally:
        system.close(file)
    return hashed(path)


def _write_files(directory: Path, snapshot: Snapshot) -> dict[str, Written]:
    tasks: dict[str, Callable[[], Written]] = {}
    for name, tensors in snapshot.tensors.items():
        tasks[name] = lambda name=name, tensors=tensors: write_tensors(directory / name, tensors)  # type: ignore[misc]
    for name, text in snapshot.texts.items():
        tasks[name] = lambda name=name, text=text: write_file(directory / name, iter([memoryview(text)]))  # type: ignore[misc]
    return _in_threads(tasks)


def _in_threads(tasks: Mapping[str, Callable[[], Written]]) -> dict[str, Written]:
    """Run tasks in a few threads, all to their end, and raise the error of the first that failed, if one did.

    An executor would do, but takes no work once the main thread has ended, when the last save may still be running.
    """
    waiting, results = deque(tasks), dict[str, Written]()
    errors: dict[str, BaseException] = {}

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                name = waiting.popleft()
                try:
                    results[name] = tasks[name]()
                except BaseException as error:  # whatever it is, it is raised below
                    errors[name] = error

    threads = [threading.Thread(target=work, name=f"checkpoint {i}") for i in range(min(WRITERS, len(tasks)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C, or no thread can be started: nothing is written any more when it is told
        waiting.clear()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    for name in tasks:
        if name in errors:
            raise errors[name]
    return {name: results[name] for name in tasks}


def _manifest(session: Session, snapshot: Snapshot, files: dict[str, Written], pinned: bool) -> Manifest:
    orders = [entry.manifest.order for entry in catalog.list_checkpoints(session.directory) if entry.manifest]
    return Manifest(
        step=snapshot.step,
        samples=snapshot.samples,
        order=max(orders, default=-1) + 1,
        run=session.run,
        attempt=session.attempt,
        time=time.time(),
        files=files,
        metrics=dict(snapshot.metrics),
        pinned=pinned,
    )


def _move_in(directory: Path, temporary: Path, home: Path, token: str) -> None:
    aside = directory / f".replaced-{home.name}-{token}"
    replaces = home.is_dir() or home.is_symlink()  # a file that someone put there is refused by the rename
    try:
        if replaces:
            system.rename(home, aside)
        system.rename(temporary, home)
    except OSError:  # which may come although the entry was moved
        if replaces and not os.path.lexists(home):
            system.rename(aside, home)
        raise
    system.sync_directory(directory)
    if replaces:
        with _tolerated(aside):
            discard(aside)


def rotate(directory: Path, policy: Policy) -> None:
    """Remove the checkpoints that a policy does not keep; one that cannot be removed is tried again the next time."""
    for entry in superseded(catalog.list_checkpoints(directory), policy):
        with _tolerated(entry.path):
            discard(entry.path)


def discard(path: Path) -> None:
    """Remove a checkpoint: first from what is found, in one step that is on the disk, then file by file."""
    trash = path.parent / f".trash-checkpoint-0-{secrets.token_hex(4)}"
    system.rename(path, trash)
    system.sync_directory(path.parent)
    system.remove_tree(trash)


@contextlib.contextmanager
def _tolerated(path: Path) -> Iterator[None]:
    """Report that something could not be removed; what was saved is saved all the same."""
    try:
        yield
    except OSError as error:
        logger.warning("%s could not be removed, and will be tried again: %s", path, error)


def check_space(directory: Path, snapshot: Snapshot) -> None:
    """Compare what a save needs with what the disk has.

    Raises:
        OSError: It has less (ENOSPC).
    """
    needed, free = snapshot.size(), system.free_bytes(directory)
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: a save needs {needed:,} bytes, there are {free:,}",
            str(directory),
        )
