"""Turns: of all threads of a process, one computes at a time.

A step stands its module on the memory of its own state, and seeds torch's global generators, which it puts back. Two
threads that did so at once would write each other's gradients and draw each other's numbers, and nothing would fail. So
whatever does one of the two takes the turn, and other threads wait until it is over.
"""

import os
import threading
from contextlib import AbstractContextManager

_turns = [threading.RLock()]


def turn() -> AbstractContextManager[bool]:
    """Give the turn, as a context in which the calling thread has it; it may be taken again within.

    Example:
        >>> with turn(), turn():
        ...     pass
    """
    return _turns[0]


def _begin_anew() -> None:
    """Let go of the turn in a process that was forked: the thread that had it is not there."""
    _turns[0] = threading.RLock()


os.register_at_fork(after_in_child=_begin_anew)
