"""The commit of a checkpoint: it is there, whole and on the disk, or it is not.

    write every file into a temporary sibling and sync it; the manifest last; sync the directory
    rename it to checkpoint-<step>; sync the parent                                     <- the commit

Where a checkpoint of that step exists (the run went back), it is first renamed aside, and removed after the commit; the
one aside is found as well, so that there is no instant without a whole one.
"""

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs

from forgather_fn.checkpoint import catalog, system
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.manifest import Manifest
from forgather_fn.checkpoint.safe import Written, write_file, write_tensors
from forgather_fn.checkpoint.snapshot import Snapshot


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
    directory.mkdir(parents=True, exist_ok=True)
    entries = catalog.list_checkpoints(directory)
    known = [entry.manifest.run for entry in entries if entry.manifest]
    sweep(directory)
    return Session(directory, known[-1] if known else secrets.token_hex(8), secrets.token_hex(8))


def sweep(directory: Path) -> None:
    """Remove what saves that did not end have left; a checkpoint that was moved aside for one comes back."""
    for path in sorted(directory.iterdir()):
        if catalog.TEMPORARY.fullmatch(path.name):
            system.remove_tree(path)
        elif aside := catalog.ASIDE.fullmatch(path.name):
            home = directory / f"checkpoint-{aside[1]}"
            if not home.exists():
                system.rename(path, home)
                system.sync_directory(directory)
            elif not catalog.entry(home).faults:
                discard(path)


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
    check_space(session.directory, snapshot)
    token = secrets.token_hex(4)
    home = session.directory / f"checkpoint-{snapshot.step}"
    temporary = session.directory / f".tmp-checkpoint-{snapshot.step}-{token}"
    try:
        system.make_directory(temporary)
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


def _write_files(directory: Path, snapshot: Snapshot) -> dict[str, Written]:
    """Write all files, several at a time: hashing one and writing another take different parts of the machine."""
    tasks: dict[str, Callable[[], Written]] = {}
    for name, tensors in snapshot.tensors.items():
        tasks[name] = lambda name=name, tensors=tensors: write_tensors(directory / name, tensors)  # type: ignore[misc]
    for name, text in snapshot.texts.items():
        tasks[name] = lambda name=name, text=text: write_file(directory / name, iter([memoryview(text)]))  # type: ignore[misc]
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="checkpoint") as pool:
        futures = {name: pool.submit(task) for name, task in tasks.items()}
        return {name: future.result() for name, future in futures.items()}


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
    replaces = home.exists()
    if replaces:
        system.rename(home, aside)
    try:
        system.rename(temporary, home)
    except OSError:
        if replaces:
            system.rename(aside, home)
        raise
    system.sync_directory(directory)
    if replaces:
        discard(aside)


def discard(path: Path) -> None:
    """Remove a checkpoint: first from what is found, in one step, then file by file."""
    trash = path.parent / f".trash-checkpoint-0-{secrets.token_hex(4)}"
    system.rename(path, trash)
    system.remove_tree(trash)


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
