"""A process ends after the threads of gloo have let go of what they hold, and not before."""

import atexit
import ctypes
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed

from forgather.ml import DistributedEnvironment
from forgather_fn.distributed import rest as rest_module
from forgather_fn.distributed.rest import TASKS, rest, rest_at_exit
from forgather_fn.strategy.processes import launched_on
from forgather_fn.testing.processes import processes

linux = pytest.mark.skipif(not TASKS.exists(), reason="the system does not list the threads of a process")


def states() -> list[str]:
    found = [rest_module._state(task) for task in TASKS.iterdir()]
    return [state for state in found if state is not None]


@linux
def test_torch_calls_its_threads_as_is_expected(tmp_path: Path):
    with DistributedEnvironment(always=True):
        distributed.all_reduce(torch.ones(3))
        rest()
        assert states() == ["S", "S"]


def busy(name: bytes, begun: threading.Event) -> float:
    """Compute, without the interpreter's lock, in a thread that the system knows by a name; give when it was done."""
    ctypes.CDLL(None).pthread_setname_np(ctypes.c_ulong(threading.get_ident()), name)
    begun.set()
    hashlib.sha256(bytes(200_000_000)).digest()
    return time.monotonic()


@linux
@pytest.mark.parametrize(("name", "waits"), [(b"pt_gloo_runloop", True), (b"another", False)])
def test_only_a_thread_of_gloo_that_works_is_waited_for(name: bytes, waits: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rest_module, "LIMIT", 60.0)
    begun, done = threading.Event(), []
    thread = threading.Thread(target=lambda: done.append(busy(name, begun)))
    thread.start()
    begun.wait()
    rest()
    assert bool(done) is waits
    thread.join()


@linux
def test_a_thread_that_never_rests_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rest_module, "LIMIT", 0.02)
    monkeypatch.setattr(rest_module, "_at_work", lambda tasks: True)
    rest()


@pytest.mark.parametrize("there", [True, False])
def test_where_threads_are_not_listed_it_pauses(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "task"
    if there:  # a thread that has ended since
        (folder / "1").mkdir(parents=True)
    monkeypatch.setattr(rest_module, "TASKS", folder)
    rest()


def asked(opened: Callable[[], object]) -> int:
    """Count how often it is asked for, at the end of this process, where a world is opened twice."""
    calls: list[object] = []
    register, atexit.register = atexit.register, calls.append  # type: ignore[assignment]
    rest_at_exit.cache_clear()
    try:
        opened()
        opened()
    finally:
        atexit.register = register  # type: ignore[method-assign]
    return calls.count(rest)


def join() -> int:
    return asked(lambda: launched_on(torch.device("cpu")))


def test_a_process_with_others_asks_for_it_once():
    with processes(2) as pool:
        assert pool.run(join) == [1, 1]


def test_the_class_layer_asks_for_it_where_it_opens_the_group():
    assert asked(lambda: DistributedEnvironment(always=True).close()) == 1
