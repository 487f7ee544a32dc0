import sys
import threading
from unittest.mock import Mock

import attrs
import pytest

from forgather_fn.distributed import hooks


@attrs.define(eq=False)
class Noting:
    """Notes what it is told."""

    told: list[object] = attrs.field(factory=list)
    ended: list[object] = attrs.field(factory=list)

    def fail(self, error):
        self.told.append(error)

    def leave(self, error):
        self.told.append("left")
        self.ended.append(error)

    def forget(self):
        self.told.append("forgotten")


@pytest.fixture
def previous(monkeypatch):
    """Hooks that others have set before."""
    called: list[object] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: called.append(error))
    monkeypatch.setattr(threading, "excepthook", lambda arguments: called.append(arguments.exc_value))
    return called


def raise_in_a_thread(error):
    def run():
        raise error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_an_error_that_nobody_caught_is_told_and_passed_on(previous):
    ending, error = Noting(), ValueError()
    undo = hooks.tell(ending)
    sys.excepthook(ValueError, error, None)
    assert (ending.told, previous) == ([error], [error])
    undo()
    sys.excepthook(ValueError, error, None)
    assert (ending.told, previous) == ([error], [error, error])


def test_an_error_that_nobody_caught_is_known_at_the_end(previous, monkeypatch):
    finalize = Mock()  # what is called where Python 3.13 has forgotten the error
    monkeypatch.setattr(hooks, "Finalize", finalize)
    ending, error = Noting(), ValueError()
    undo = hooks.tell(ending)
    leaving = finalize.call_args.args[1]
    leaving()
    sys.excepthook(ValueError, error, None)
    leaving()
    undo()
    assert (ending.told, ending.ended) == (["left", error, "left"], [None, error])


def test_threads_count_where_they_train(previous):
    other, own = ValueError("other"), ValueError("own")
    ending = Noting()
    undo = hooks.tell(ending)
    raise_in_a_thread(other)
    undo()
    assert (ending.told, previous) == ([], [other])

    def train():
        undos.append(hooks.tell(ending))
        raise own

    undos: list = []
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    undos[0]()
    assert (ending.told, previous) == ([own], [other, own])


def test_hooks_that_were_set_since_are_left_alone(previous):
    ending = Noting()
    undo = hooks.tell(ending)
    inner = sys.excepthook
    later = lambda *arguments: inner(*arguments)  # noqa: E731
    sys.excepthook = later
    undo()
    assert sys.excepthook is later
    later(ValueError, ValueError(), None)
    assert len(previous) == 1
