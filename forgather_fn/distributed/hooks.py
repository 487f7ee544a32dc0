"""The ways in which a Python process ends, and what is called on each."""

import os
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing import process
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any, Protocol


class Ending(Protocol):
    """What is told how its process ends."""

    def fail(self, error: BaseException, /) -> None:
        """Hear of an error that nobody caught."""
        ...

    def leave(self, error: BaseException | None, /) -> None:
        """Hear that the interpreter ends, and with which error, where that can still be seen."""
        ...

    def forget(self) -> None:
        """Hear that this is a forked child, and not the process that asked to be told."""
        ...


_told: weakref.WeakSet[Any] = weakref.WeakSet()
_BOOTSTRAP: Any = process.BaseProcess._bootstrap.__code__  # type: ignore[attr-defined]  # typeshed leaves it out
"""What runs a process that multiprocessing has forked, and prints an error that nobody caught."""


def tell(ending: Ending) -> Callable[[], None]:
    """Tell an object how this process ends; what it replaces is called after it.

    An error that nobody caught counts where it ends the training: in the main thread, and in the thread that called
    this. Any other thread may die and the process lives, as it does without this.

    Returns:
        A function that undoes it.
    """
    own = threading.current_thread()
    before, before_in_threads = sys.excepthook, threading.excepthook

    last: list[BaseException] = []

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        ending.fail(error)
        last.append(error)
        before(kind, error, trace)

    def uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.thread is own and arguments.exc_value is not None:
            ending.fail(arguments.exc_value)
        before_in_threads(arguments)

    def uncaught_in_fork(*arguments: Any, **options: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and ending in _told and sys._getframe(1).f_code is _BOOTSTRAP:
            ending.fail(error)
        before_in_forks(*arguments, **options)

    def leaving() -> None:
        _told.discard(ending)
        ending.leave(sys.exc_info()[1] or (last[-1] if last else None))

    def undo() -> None:
        at_exit.cancel()
        _told.discard(ending)
        if sys.excepthook is uncaught:  # else somebody has chained to it since, and it must stay in the chain
            sys.excepthook = before
        if threading.excepthook is uncaught_in_thread:
            threading.excepthook = before_in_threads
        if traceback.print_exc is uncaught_in_fork:
            traceback.print_exc = before_in_forks

    sys.excepthook, threading.excepthook = uncaught, uncaught_in_thread
    # What atexit calls, and what processes call that multiprocessing has forked, which end without atexit, and without
    # excepthook. (What it does is undone by a process that was forked from this one.)
    # As of Python 3.13 the error is no longer there by then: it was printed, which is when it is heard of.
    before_in_forks = traceback.print_exc
    traceback.print_exc = uncaught_in_fork
    at_exit = Finalize(None, leaving, exitpriority=100)
    _told.add(ending)
    return undo


def _forget() -> None:
    for one in tuple(_told):
        one.forget()
    _told.clear()


os.register_at_fork(after_in_child=_forget)
