"""A process that fails ends all others, soon, and each says why; a process that is done ends nobody."""

import contextlib
import multiprocessing
import os
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path

import attrs
import pytest
import torch
from torch import distributed

from forgather_fn import interrupt
from forgather_fn.distributed import watch as watch_module
from forgather_fn.distributed.watch import Watcher, watching
from forgather_fn.testing.processes import ProcessesFailed, processes
from forgather_fn.world import STEP, PeerError, World, known_to_all

LONG = 40.0
"""Seconds for which a process is busy that nobody ends."""
STAY = 1.3
"""Seconds for which a process that has failed by an error is still there: longer than the others are given."""
SOON = 15.0
"""Seconds in which all must have ended, on a machine that has other things to do as well."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(watch_module, "GRACE", 0.3)  # what is forked within a test has it too


def watched() -> tuple[World, Watcher]:
    world = World(distributed.get_rank(), distributed.get_world_size(), control=distributed.group.WORLD)
    watch = watching(world)
    return attrs.evolve(world, watch=watch), watch


def ended(size, function, *args):
    """Run what no process of a pool survives: how each ended, and after how many seconds all had."""
    with processes(size) as pool:
        pool.pids()
        start = time.monotonic()
        with pytest.raises(ProcessesFailed) as caught:
            pool.run(function, *args)
        return caught.value.errors, time.monotonic() - start


# What processes do when another one fails.


def in_python(world):
    while True:
        sum(range(100))


def in_torch(world):
    matrix = torch.randn(300, 300)
    while True:
        matrix = torch.tanh(matrix @ matrix)


def asleep(world):
    time.sleep(LONG)


def holding_the_interpreter(world):
    while True:
        sum(range(30_000_000))  # one call in C


def in_a_collective(world):
    world.gather(None)
    time.sleep(LONG)


BUSY = [in_python, in_torch, asleep, holding_the_interpreter, in_a_collective]


# How they fail.


def raising(world, watch):
    try:
        raise ValueError("what")
    except ValueError as error:
        watch.fail(error)
    time.sleep(STAY)


def killed(world, watch):
    os.kill(os.getpid(), signal.SIGKILL)


def left_at_once(world, watch):
    os._exit(3)


def speaking_nonsense(world, watch):
    for peer in watch._peers.values():
        peer.socket.sendall(b"[" * 5000 + b"\n")
    time.sleep(LONG)


def speaking_without_end(world, watch):
    for peer in watch._peers.values():
        peer.socket.settimeout(1)
        with contextlib.suppress(OSError):
            peer.socket.sendall(b"x" * (1 << 22))
    time.sleep(LONG)


@pytest.mark.parametrize("how", [speaking_nonsense, speaking_without_end])
def test_one_that_says_what_is_no_word_has_failed(how, capfd):
    errors, seconds = ended(2, one_fails, 0, how, [in_python])
    assert set(errors) == {0, 1}
    assert seconds < SOON
    assert "rank 0 failed: what it said of its end is none (" in capfd.readouterr().err


HOW = {
    raising: "failed: ValueError: what\nTraceback",
    killed: "failed: it ended without",
    left_at_once: "failed: it ended",
}


def one_fails(victim, how, busy):
    world, watch = watched()
    watch.begin(STEP)
    world.gather(None)
    if world.rank == victim:
        time.sleep(0.2)
        how(world, watch)
    else:
        busy[(world.rank - victim) % len(busy)](world)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_whichever_process_fails_ends_the_others(victim, how, capfd):
    errors, seconds = ended(3, one_fails, victim, how, [in_python, asleep])
    others = {rank: text for rank, text in errors.items() if rank != victim}
    assert set(others.values()) == {"the process ended with exit code 1"}
    assert len(others) == 2
    assert (victim in errors) is (how is not raising)  # its own error does not cut it short
    assert seconds < SOON
    said = capfd.readouterr().err
    assert said.startswith(f"rank {victim} {HOW[how]}")
    assert said.count(f"rank {victim} failed: ") == 2


@pytest.mark.parametrize("busy", BUSY)
def test_it_ends_them_whatever_they_do(busy, capfd):
    errors, seconds = ended(2, one_fails, 0, killed, [busy])
    assert errors[0] == "the process ended with exit code -9"
    if busy is in_a_collective:
        assert "PeerError: rank 0 failed: it ended without a word" in errors[1]
    else:
        assert errors[1] == "the process ended with exit code 1"
        assert capfd.readouterr().err.startswith("rank 0 failed: it ended without a word")
    assert seconds < SOON


def listening_for_signals():
    world, _ = watched()
    if world.rank == 0:
        os.kill(world.gather(os.getpid())[1], signal.SIGTERM)  # as torchrun does, before or after the sockets close
        os.kill(os.getpid(), signal.SIGKILL)
    with interrupt.listening():
        world.gather(os.getpid())
        in_python(world)


def test_a_signal_that_only_sets_a_flag_does_not_keep_it_alive(capfd):
    errors, seconds = ended(2, listening_for_signals)
    assert errors[1] == "the process ended with exit code 1"
    said = capfd.readouterr().err
    assert "stopping after this step (SIGTERM again: at once)" in said
    assert "rank 0 failed: it ended without a word" in said
    assert seconds < SOON


# What the training is told, and when.


def told_where_a_step_begins(victim):
    world, watch = watched()
    watch.begin(STEP)
    world.gather(None)
    if world.rank == victim:
        raising(world, watch)
    assert watch.cause(20.0) is not None
    try:
        watch.begin(STEP)
    except PeerError as error:
        told = str(error)
    watch.close()
    return told


def told_by_the_collective_that_broke(victim):
    world, watch = watched()
    world.gather(None)
    if world.rank == victim:
        watch.fail(KeyError("root"))
        distributed.destroy_process_group()
        return "root"
    with pytest.raises(PeerError) as caught:
        world.gather(None)
    watch.close()
    return str(caught.value)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("function", [told_where_a_step_begins, told_by_the_collective_that_broke])
def test_the_training_is_told_the_root_and_may_end_by_itself(function, victim, monkeypatch):
    monkeypatch.setattr(watch_module, "GRACE", 5.0)
    monkeypatch.setattr(sys.modules[__name__], "STAY", 0.2)
    with processes(3) as pool:
        said = pool.run(tolerated, function, victim)
    del said[victim]
    assert [text.splitlines()[0] for text in said] == [ROOTS[function].format(victim)] * 2


ROOTS = {
    told_where_a_step_begins: "rank {} failed: ValueError: what",
    told_by_the_collective_that_broke: "rank {} failed: KeyError: 'root'",
}


def tolerated(function, victim):
    """Call a function that leaves a local unset where its process is the one that failed."""
    with contextlib.suppress(UnboundLocalError):
        return function(victim)


def broken_before_the_word_comes():
    world, watch = watched()
    world.gather(None)
    rank = world.rank
    del world  # which holds the group
    if rank == 1:
        distributed.destroy_process_group()
        time.sleep(0.4)
        watch.fail(ValueError("late"))
    elif rank == 0:
        with pytest.raises(RuntimeError, match="gloo") as caught:
            distributed.all_reduce(torch.zeros(1))
        watch.fail(caught.value)
    time.sleep(LONG)


def test_an_error_that_another_process_has_caused_is_not_told_as_the_root(capfd, monkeypatch):
    monkeypatch.setattr(watch_module, "GRACE", 2.0)
    monkeypatch.setattr(sys.modules[__name__], "LONG", 3.0)
    ended(3, broken_before_the_word_comes)
    said = capfd.readouterr().err
    assert said.startswith("rank 1 failed: ValueError: late")
    assert "rank 0 failed" not in said


def told_and_still_there(how):
    world, _ = watched()
    world.gather(None)
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerError):
        world.gather(None)
    how(world)


def holding_the_interpreter_to_the_end(world):
    sum(range(10**12))


@pytest.mark.parametrize("how", [asleep, holding_the_interpreter_to_the_end])
def test_one_that_was_told_and_does_not_end_is_ended(how, capfd):
    errors, seconds = ended(2, told_and_still_there, how)
    assert errors[1] == "the process ended with exit code 1"
    assert seconds < SOON
    said = capfd.readouterr().err
    assert ("in holding_the_interpreter_to_the_end" in said) is (how is not asleep)
    assert ("rank 1 is ended, since it has not ended by itself" in said) is (how is asleep)


# What is not a failure.


def done_at_different_times(steps):
    world, watch = watched()
    for _ in range(steps):
        watch.begin(STEP)
        time.sleep(0.05 * world.rank)
    world.gather(None)
    time.sleep(0.4 * world.rank)  # some are done while others are busy, for longer than the time of grace
    watch.close()
    return watch.cause(0.0) is None or world.rank


def test_processes_that_are_done_may_leave_at_different_times(capfd):
    with processes(3) as pool:
        pool.run(done_at_different_times, 2)
        pool.run(done_at_different_times, 2)
    assert capfd.readouterr().err == ""


def failing_alike():
    world, watch = watched()
    world.gather(None)
    watch.fail(known_to_all(ValueError("on all")))
    world.gather(None)
    time.sleep(0.1)
    watch.begin(STEP)
    watch.close()


def test_an_error_that_all_raise_at_the_same_point_ends_nobody(capfd):
    with processes(2) as pool:
        pool.run(failing_alike)
    assert capfd.readouterr().err == ""


def left_before_a_step(steps, further):
    world, watch = watched()
    for _ in range(steps):
        watch.begin(STEP)
    world.gather(None)
    if world.rank == 0 and further == "before":
        watch.begin(STEP)
    world.gather(None)
    if world.rank == 1:
        watch.close()
    elif further == "before":
        time.sleep(LONG)
    else:
        while not watch._left:
            time.sleep(0.01)
        with pytest.raises(PeerError) as caught:
            watch.begin(STEP)
        watch.close()
        return str(caught.value)
    return None


def test_one_that_leaves_before_a_step_of_the_others_fails_it(capfd):
    with processes(2) as pool:
        said, _ = pool.run(left_before_a_step, 2, "after")
    assert said.startswith("rank 1 has ended, in peace (process ")
    assert "rank 0, which has begun a step after it, needed it: every process of a run takes part" in said
    errors, seconds = ended(2, left_before_a_step, 2, "before")
    assert errors == {0: "the process ended with exit code 1"}
    assert seconds < SOON
    assert "rank 0, which has begun a step after it, needed it" in capfd.readouterr().err


def begun_alone(then):
    world, watch = watched()
    watch.begin(STEP)
    world.gather(None)
    if world.rank == 1:
        if then == "before":
            world.gather(None)
        watch.begin("an evaluation")
    elif then == "before":
        watch.begin(STEP)
        world.gather(None)
        time.sleep(LONG)
    else:
        while not watch._others:
            time.sleep(0.01)
        with pytest.raises(PeerError, match=r"rank 1 begins an evaluation .* where rank 0 begins a step"):
            watch.begin(STEP)
        time.sleep(LONG)


@pytest.mark.parametrize("then", ["before", "after"])
def test_an_evaluation_that_one_process_begins_alone_fails_the_run(then, capfd):
    errors, seconds = ended(2, begun_alone, then)
    assert seconds < SOON
    assert errors[0] == "the process ended with exit code 1"
    assert "PeerError: rank 1 begins an evaluation (process " in errors[1]
    assert "where rank 0 begins a step: every process of a run takes part in every step" in capfd.readouterr().err


def at_another_point(how):
    world, watch = watched()
    for _ in range({"behind": 3, "gone": 3, "ahead": 1}[how] if world.rank else 1):
        watch.begin(STEP)
    world.gather(None)
    if world.rank == 0:
        if how == "gone":
            while not watch._left:
                time.sleep(0.01)
        watch.begin("an evaluation")
    elif how == "ahead":
        watch.begin(STEP)
        watch.begin("an evaluation")
    elif how == "gone":
        watch.close()
    else:
        time.sleep(LONG)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("behind", "rank 0 begins an evaluation"),  # of which the others hear when they have gone on
        ("ahead", "begins an evaluation"),  # at another point of each
        ("gone", "rank 1 has ended, in peace"),  # after it has begun more than the one that waits for it
    ],
)
def test_processes_that_stand_at_other_points_do_not_wait_for_each_other(how, said, capfd):
    errors, seconds = ended(2, at_another_point, how)
    assert seconds < SOON
    assert said in capfd.readouterr().err + "".join(errors.values())


def waiting_for_one_that_hangs():
    world, watch = watched()
    watch.patience = 0.5
    world.gather(None)
    if world.rank == 1:
        time.sleep(LONG)
    watch.begin("a save")


def test_a_process_that_hangs_is_not_waited_for_for_ever(capfd):
    errors, seconds = ended(2, waiting_for_one_that_hangs)
    assert seconds < SOON
    assert "PeerError: rank 1 has not begun a save in the 0 s in which rank 0 has waited for it" in errors[0]


def patience():
    _, watch = watched()
    watch.close()
    watch.begin("a save")  # at the very end of a process, where nobody hears any more
    return watch.patience


def test_it_waits_as_long_as_the_process_group_does():
    with processes(2) as pool:
        assert pool.run(patience) == [1800.0, 1800.0]


def left_behind():
    def things():
        return threading.active_count(), len(os.listdir("/dev/fd")), sys.excepthook, threading.excepthook

    before = things()
    _, watch = watched()
    assert things() != before
    watch.close()
    return things() == before


def test_nothing_is_left_when_it_is_closed():
    with processes(2) as pool:
        pool.run(left_behind)
        assert pool.run(left_behind) == [True, True]


# Children.


def keep_only_the_network():
    """Close what the pool waits for."""
    for number in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):
            if (
                not stat.S_ISSOCK(os.fstat(number).st_mode)
                or socket.socket(fileno=os.dup(number)).family == socket.AF_UNIX
            ):
                os.close(number)


def forking(path):
    world, _ = watched()
    world.gather(None)
    if world.rank == 0:
        child = os.fork()
        if child == 0:
            keep_only_the_network()
            time.sleep(LONG)  # as a worker of the data that has not noticed yet
            os._exit(0)
        Path(path).write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LONG)


def test_children_of_a_process_do_not_hold_its_sockets_open(tmp_path, capfd):
    try:
        _, seconds = ended(2, forking, tmp_path / "child")
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert seconds < SOON
    assert capfd.readouterr().err.startswith("rank 0 failed: it ended without a word")


def forking_one_that_fails():
    world, watch = watched()
    if world.rank == 0:
        child = os.fork()
        if child == 0:
            watch.fail(ValueError("of a child"))
            watch.leave(None)
            watch.close()
            os._exit(0)
        os.waitpid(child, 0)
    world.gather(None)
    time.sleep(0.5)
    watch.begin(STEP)
    watch.close()


def test_children_do_not_speak_for_their_parent():
    with processes(2) as pool:
        pool.run(forking_one_that_fails)


# Processes that others start.


def forked(rank, store, how):
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    world, watch = watched()
    watch.begin(STEP)
    world.gather(None)
    if rank == 0:
        time.sleep(10.0 if how == "raise" else 1.0)
    elif how == "raise":
        raise ValueError("what")
    elif how == "exit":
        raise interrupt.Preempted(signal.SIGTERM)
    elif how == "interrupted":
        raise SystemExit(interrupt.INTERRUPTED)


@pytest.mark.parametrize(
    ("how", "codes"),
    [("raise", [1, 1]), ("exit", [0, 75]), ("interrupted", [0, 130]), ("return", [0, 0])],
)
def test_processes_that_multiprocessing_forks_tell_how_they_end(how, codes, tmp_path, capfd):
    context = multiprocessing.get_context("fork")
    store = (tmp_path / "store").as_uri()
    started = [context.Process(target=forked, args=(rank, store, how)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(LONG)
    assert [process.exitcode for process in started] == codes
    said = capfd.readouterr().err
    assert ("rank 1 failed: ValueError: what" in said) is (how == "raise")
    assert ("failed" in said) is (how == "raise")
