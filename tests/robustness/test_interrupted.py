"""Ctrl-C at any line of a save, and of other writes: what was there is there, and the next one goes through."""

import functools
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import toolz

import forgather_fn
import forgather_fn as ff
from forgather_fn.checkpoint import list_checkpoints, save, verify
from forgather_fn.checkpoint.catalog import latest
from tests.checkpoint.faults import assert_same, leaves, names
from tests.checkpoint.subjects import small, trajectory
from tests.toys import labelled_batches

PACKAGE = str(Path(forgather_fn.__file__).parent)


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


# What is interrupted between the opening of a file and its ``with`` is closed by the garbage collector, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


ALL = [pytest.mark.soak, pytest.mark.timeout(3000)]


@attrs.define
class Lines:
    """The lines of a part of the library that are run, of which one may be interrupted as by Ctrl-C."""

    folder: str
    interrupted: int = -1
    seen: int = 0
    place: str = ""

    def run(self, function: Callable[[], Any]) -> Any:
        """Run a function, in the main thread, in which alone Ctrl-C is heard."""
        assert threading.current_thread() is threading.main_thread()
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            return function()
        finally:
            sys.settrace(before)

    def _called(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self.folder) else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.interrupted:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def lines_of(folder: str, function: Callable[[], Any]) -> int:
    """Count the lines that are run."""
    lines = Lines(folder)
    lines.run(function)
    return lines.seen


CHECKPOINT = f"{PACKAGE}/checkpoint/"


@pytest.mark.parametrize("stride", [pytest.param(29, id="some"), pytest.param(1, id="all", marks=ALL)])
@pytest.mark.parametrize("step", [1, 2], ids=["again", "anew"])
def test_a_save_is_there_or_what_was_before_it_is(tmp_path, step, stride):
    program = small()
    program.init(0)
    new = trajectory()[step]
    count = lines_of(CHECKPOINT, lambda: save(program, new, tmp_path / "count"))
    assert count > 200
    for line in range(1, 2 * count, stride):
        run = tmp_path / str(line)
        save(program, trajectory()[1], run)
        before = {path.name for path in (run / "checkpoints").iterdir()}
        lines = Lines(CHECKPOINT, line)
        try:
            lines.run(functools.partial(save, program, new, run))
        except KeyboardInterrupt:
            pass
        else:
            assert not lines.place
            break
        found = latest(run)
        assert found is not None, lines.place
        assert verify(found.path) == [], lines.place
        assert found.step in (1, step), lines.place
        threads = [one for one in threading.enumerate() if one.name.startswith("checkpoint")]
        assert not threads, f"{lines.place}: a thread still writes"
        assert_same(leaves(program.restore(run)), leaves(trajectory()[found.step]))
        save(program, new, run)  # the lock was given up
        assert set(names(run)) == before | {f"checkpoint-{step}"}, lines.place
    else:
        raise AssertionError("the save was interrupted at none of its last lines")


@pytest.mark.parametrize("stride", [pytest.param(97, id="some"), pytest.param(1, id="all", marks=ALL)])
def test_a_run_that_saves_can_be_gone_on_with(tmp_path, stride):
    program = small()
    data = labelled_batches(3, size=4)

    def run(place, seen):
        steps = program.steps(program.init(0), data)
        noted = ff.every(1, lambda tick: seen.append(tick.state))
        toolz.pipe(steps, noted, ff.every(1, ff.saved(place)), ff.until(steps=2), ff.last)

    count = lines_of(CHECKPOINT, lambda: run(tmp_path / "count", []))
    for line in range(1, count, stride):
        place, seen = tmp_path / str(line), []
        lines = Lines(CHECKPOINT, line)
        try:
            lines.run(functools.partial(run, place, seen))
        except KeyboardInterrupt:
            state = seen[-1] if seen else program.init(0)
        else:
            break
        gc.collect()  # what was interrupted while it gave up the lock gives it up with the last that refers to it
        state, _ = program.step(state, data[state.step])  # which would wait for ever for a copy that nobody makes
        save(program, state, place)
        assert latest(place).step == state.step, lines.place


def test_a_thread_that_cannot_be_had_is_a_failed_save(tmp_path, monkeypatch):
    program = small()
    real, refused = threading.Thread.start, [True, False, False]

    def start(thread):
        if thread.name == "checkpoint writer" and refused.pop(0):
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    saving = ff.every(1, ff.saved(tmp_path))
    toolz.pipe(program.steps(program.init(0), labelled_batches(3, size=4)), saving, ff.last)
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [2, 3]
