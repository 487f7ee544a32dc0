"""Signals that ask a run to end: noted when they come, heeded where nothing is lost.

Ctrl-C (SIGINT) lets the running step and its observers finish. SIGTERM and SIGUSR1, which schedulers of jobs send
before they take a machine away, end it sooner: between two microbatches or two batches of an evaluation. A step that is
cut short consumes nothing, so the state is the one after the step before. A second signal ends the process as it would
have done without this.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

PREEMPTIONS: Final = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE: Final = 75
"""EX_TEMPFAIL of sysexits.h: not done, try again."""
INTERRUPTED: Final = 128 + signal.SIGINT
"""The exit code of commands that Ctrl-C has ended, as shells give it."""


class Interrupted(Exception):
    """A preemption was asked for: raised by :func:`check` to leave a step or an evaluation."""


class Preempted(SystemExit):
    """The run ended because a scheduler asked it to; what observes the end (a save) has been done.

    Left alone it ends the process with exit code 75.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_CODE)
        self.signal = signal.Signals(number)


_noted: list[int] = []
_listeners: list[object] = []
_before: dict[int, Any] = {}
# The signals that came since the first of the runs that listen began, those runs, and the handlers that were there
# before. A process has one set of handlers, so these are one to a process.


def requested() -> int:
    """Give the number of the signal that has asked the run to end, 0 if none has."""
    return _noted[0] if _noted else 0


def adopt(number: int) -> None:
    """Take a signal that another process of the run was sent as one of this process's own."""
    if not _noted:
        _noted.append(number)


def check() -> None:
    """Leave what is running, if a scheduler has asked for it, or what :func:`watching` was given.

    Raises:
        Interrupted: A scheduler has.
    """
    if _noted and _noted[0] in PREEMPTIONS:
        raise Interrupted
    for look in _watched.looks:
        look()


class _Watched(threading.local):
    """What each thread looks at besides signals."""

    def __init__(self) -> None:
        self.looks: list[Callable[[], None]] = []


_watched = _Watched()


@contextlib.contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """Let :func:`check` call a function too, in this thread, for the time of a block.

    Args:
        look: Raises to leave the step or the evaluation that is running; a step that it leaves consumes nothing.
    """
    looks = _watched.looks
    looks.append(look)
    try:
        yield
    finally:
        looks.remove(look)


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], int]]:
    """Note signals in a block, in the main thread.

    Runs may be nested, or side by side: handlers are set by the first and put back by the last. SIGINT is left alone
    where a program has a handler of its own for it.

    Returns:
        A function that gives the signal that came first, or 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    listener = object()
    if not _listeners:
        _install()
    _listeners.append(listener)
    try:
        yield lambda: _noted[0] if _noted else 0
    finally:
        _listeners.remove(listener)
        if not _listeners:
            _restore()


def _install() -> None:
    for number in (signal.SIGINT, *PREEMPTIONS):
        handler = signal.getsignal(number)
        if number != signal.SIGINT or handler is signal.default_int_handler:
            _before[number] = handler
            signal.signal(number, _note)


def _restore() -> None:
    for number, handler in _before.items():
        signal.signal(number, handler)
    _before.clear()
    _noted.clear()


def _note(number: int, frame: FrameType | None) -> None:
    del frame
    if not _noted:
        _noted.append(number)
        name = signal.Signals(number).name
        sys.stderr.write(f"\ninterrupted: stopping after this step ({name} again: at once)\n")
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
