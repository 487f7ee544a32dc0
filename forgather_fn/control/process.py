"""Which process something is, so that its number, used again by another, is not mistaken for it."""

import contextlib
import os
import socket
from pathlib import Path

import attrs

_PROC = Path("/proc")


@attrs.frozen
class Process:
    """One process of one machine, for all time.

    Attributes:
        host: The machine's name.
        boot: Which of its runs since it was switched on.
        namespace: In which of the kernel's numberings ``pid`` is: containers on one machine have their own.
        pid: Its number.
        started: When it started, in the kernel's ticks since the boot; 0 where the system does not tell.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: int


def this_process() -> Process:
    """Name this process."""
    pid = os.getpid()
    started = _started(pid)
    return Process(socket.gethostname(), _boot(), _namespace(), pid, started if started is not None else 0)


def alive(process: Process) -> bool | None:
    """Tell whether a process is still there.

    Returns:
        None where that cannot be told from here: it is of another machine, or of another container.
    """
    here = this_process()
    if process.host != here.host:
        return None
    if process.boot != here.boot:
        return False
    if process.namespace != here.namespace:
        return None
    if not process.started:
        return _exists(process.pid)
    return _started(process.pid) == process.started


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> int | None:
    """Read when a process started; None where there is none, or only what is left of one that has ended."""
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _boot() -> str:
    with contextlib.suppress(OSError):
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink(_PROC / "self/ns/pid")
    return ""
