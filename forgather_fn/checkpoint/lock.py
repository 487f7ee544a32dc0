"""One writer to a run directory."""

import contextlib
import fcntl
import io
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from forgather_fn.checkpoint import system

NAME = ".lock"

_held: weakref.WeakSet[io.FileIO] = weakref.WeakSet()
"""Files, and no numbers of files: one that Ctrl-C lets nobody close is closed when nothing refers to it any more."""


def _let_go() -> None:
    """Close, in a child that was just forked, the locks of its parent: a worker must not outlive it as their holder."""
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_let_go)


class RunLockedError(ValueError):
    """Another process writes to the run directory."""


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is made if it does not exist.

    The lock is the kernel's: it goes with the process that holds it, however that ends, so a stale file is in nobody's
    way. Network file systems may not honour it.

    Raises:
        RunLockedError: Another process holds it; which one, is said.
        OSError: The directory cannot be made or written to, or the lock is a link, which could lead to any file.
    """
    system.make_path(run)
    with io.FileIO(str(run / NAME), "r+", opener=_opened) as file:
        _held.add(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(f"{run} is being written to by {_holder(file)}; use another run directory") from None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        file.truncate(0)
        os.pwrite(file.fileno(), json.dumps(holder).encode("utf-8"), 0)
        yield


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _holder(file: io.FileIO) -> str:
    try:
        record = json.loads(os.pread(file.fileno(), 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(record["since"])))
        holder = f"process {int(record['pid'])} on {record['host']} since {since}"
        if (record["pid"], record["host"]) != (os.getpid(), socket.gethostname()):
            return holder
        return f"{holder}, which is this one: a stream that saves there is open, or another ff.saved stands in this one"
    except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):  # it says something else
        return "another process"
