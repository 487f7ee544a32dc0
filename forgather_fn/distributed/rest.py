"""Let the threads of gloo come to rest before the interpreter ends.

A collective over gloo is run by a thread of its own, which lets go of the tensors a little after their values are
there, and takes the interpreter's lock for it. One that is late, on a loaded machine, and asks for the lock when the
interpreter is ending already, is ended by it in the middle of C++, and with it the process: "terminate called without
an active exception", exit code -6, after a training that was complete. Closing the group does not help, since the
threads live until the last reference to it is gone.
"""

import atexit
import functools
import time
from pathlib import Path
from typing import Final

TASKS: Final = Path("/proc/self/task")
NAME: Final = "pt_gloo_runloop"
"""What torch calls those threads."""

LIMIT: Final = 2.0
"""Seconds after which the process ends all the same: a collective that another process has left may hang for ever."""

PAUSE: Final = 0.002
LOOKS: Final = 3
"""A thread rests that sleeps at so many looks, with as many pauses between them in which the lock is free."""


@functools.cache
def rest_at_exit() -> None:
    """Have this process, when it ends, wait for the threads of gloo; asked for again, it changes nothing."""
    atexit.register(rest)


def rest() -> None:
    """Wait until no thread of gloo has work left, for 2 s at most.

    Where the system does not list the threads of a process (it is not Linux), a pause is all that can be done.
    """
    deadline, quiet = time.monotonic() + LIMIT, 0
    while quiet < LOOKS and time.monotonic() < deadline:
        time.sleep(PAUSE)
        quiet = 0 if _at_work(TASKS) else quiet + 1


def _at_work(tasks: Path) -> bool:
    """Tell whether a thread of gloo runs, or would if it had a core."""
    return any(_state(task) not in ("S", None) for task in tasks.glob("*"))


def _state(task: Path) -> str | None:
    """Read the state of a thread of gloo, as proc(5) writes it; None for any other, and for one that has ended."""
    try:
        name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
    except OSError:
        return None
    return rest.split()[0] if name == NAME else None
