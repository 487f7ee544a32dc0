"""Clocks that go back: the order of checkpoints, what is the newest, and what is shown do not depend on them."""

import os
import time

import pytest

from forgather_fn.checkpoint import list_checkpoints, load, save
from forgather_fn.checkpoint.commit import rotate
from forgather_fn.checkpoint.rotation import Policy
from forgather_fn.control.agreement import _Polled
from forgather_fn.control.endpoint import Endpoint
from forgather_fn.control.inbox import Inbox
from forgather_fn.control.process import this_process
from forgather_fn.control.status import status
from tests.checkpoint.subjects import small, trajectory


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def backwards(monkeypatch):
    """A clock that is an hour earlier at every look."""
    now = [2e9]

    def look():
        now[0] -= 3600.0
        return now[0]

    monkeypatch.setattr(time, "time", look)


def test_the_newest_is_the_one_committed_last(tmp_path, backwards):
    program = small()
    program.init(0)
    for step in (1, 2, 3):
        save(program, trajectory()[step], tmp_path)
    times = [entry.manifest.time for entry in list_checkpoints(tmp_path)]
    assert times == sorted(times, reverse=True)
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [1, 2, 3]
    assert load(tmp_path).record["step"] == 3
    rotate(tmp_path / "checkpoints", Policy(keep=1))
    assert [entry.step for entry in list_checkpoints(tmp_path)] == [3]


def test_a_status_has_no_age_below_nought(tmp_path, monkeypatch):
    program = small()
    program.init(0)
    save(program, trajectory()[1], tmp_path)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    endpoint = Endpoint(job="a", run=str(tmp_path), since=1.0, process=this_process(), socket="/s")
    assert status(Inbox(tmp_path), endpoint)["checkpoint"]["age"] == 0.0


def test_processes_agree_where_time_stands_still_or_goes_back():
    for clock in (lambda: 0.0, iter(range(10**6, 0, -1000)).__next__, lambda: 1e308):
        sent = []
        polled = _Polled(lambda number, sent=sent: (sent.append(number), number)[1], True, clock)
        for _ in range(1000):
            assert polled(None) is None
        assert sent
        assert min(sent) >= 0
