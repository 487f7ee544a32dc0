"""`forgather launch`, and what launchers see of a run that fails."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from forgather_fn.cli import main
from forgather_fn.distributed.cli import _root, launch

SCRIPT = Path(__file__).parent / "script.py"
FORGATHER = [sys.executable, "-m", "forgather_fn", "launch", "-n", "2", "--cpu"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"]
ACCELERATE += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What torch's launcher is asked to do, which then does what a test says."""
    asked = []
    failure: list[Exception] = []

    def stand_in(arguments):
        asked.append(arguments)
        if failure:
            raise failure[0]

    monkeypatch.setattr(run, "run", stand_in)
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    Path("train.py").touch()
    return asked, failure


def test_what_is_asked_is_passed_on(started, monkeypatch):
    asked, _ = started
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    where = ["--nnodes", "2", "--node-rank=1", "--master-addr", "ada", "--master-port", "29500", "--max-restarts", "3"]
    assert main(["launch", "-n", "3", "--cpu", *where, "train.py", "--steps", "3", "-n", "5"]) == 0
    (one,) = asked
    assert (one.nproc_per_node, one.training_script, one.training_script_args) == (
        "3",
        "train.py",
        ["--steps", "3", "-n", "5"],
    )
    assert (one.nnodes, one.node_rank, one.master_addr, one.master_port) == ("2", 1, "ada", 29500)
    assert (one.max_restarts, one.module, one.shutdown_timeout) == (3, False, 120)
    assert "SIGUSR1" in one.signals_to_handle
    assert [os.environ[name] for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU")] == ["2", "true"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_module_and_what_the_user_has_set(started, monkeypatch):
    asked, _ = started
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert main(["launch", "-n", "2", "--shutdown-timeout", "9", "-m", "package.train", "x"]) == 0
    (one,) = asked
    assert (one.module, one.training_script, one.training_script_args) == (True, "package.train", ["x"])
    assert (os.environ["OMP_NUM_THREADS"], one.shutdown_timeout) == ("7", 9)


def failed(code):
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="none")
    return ChildFailedError("train.py", {1: failure})


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (failed(3), 3),
        (failed(75), 75),
        (failed(-9), 137),
        (SignalException("told", signal.SIGTERM), 75),
        (SignalException("told", signal.SIGUSR1), 75),
        (SignalException("told", signal.SIGINT), 130),
    ],
)
def test_the_exit_code_tells_how_it_ended(started, failure, code):
    started[1].append(failure)
    assert launch(["train.py"], 2) == code


def test_the_root_is_not_who_was_ended_because_of_it():
    assert _root([(9, -15), (9, 3)]) == 3
    assert _root([(9, 1), (9, -9)]) == -9
    assert _root([(9, 1), (8, 3)]) == 3
    assert _root([(9, -15)]) == -15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0", "train.py"], "expected a number of processes, -n N, of at least 1"),
        (["--cpu", "train.py"], "expected a number of processes, -n N, of at least 1"),
        (["-n", "2", "none.py"], "launch: none.py: no such file; expected SCRIPT.py ARGS..., or -m MODULE ARGS..."),
    ],
)
def test_what_cannot_be_launched_is_told(started, capsys, arguments, message):
    assert main(["launch", *arguments]) == 2
    assert message in capsys.readouterr().err


# Real launches; each takes seconds.


def test_an_error_on_one_process_ends_the_run_and_is_named():
    done = subprocess.run(
        [*FORGATHER, SCRIPT, "raise", "--x"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "rank 0 of 2: 2, ['raise', '--x']" in done.stdout
    root = done.stderr.index("ValueError: what")
    assert "Connection" not in done.stderr[:root]
    assert "\nrank 1 failed: ValueError: what\nTraceback (most recent call last):\n" in "\n" + done.stderr
    # The launcher's summary has it from the process that failed, and not from the one that was ended.
    assert re.search(r"Root Cause[^=]*rank +: 1[^=]*ValueError: what", done.stderr)


def test_an_error_that_all_processes_raise_is_in_the_summary():
    done = subprocess.run([*FORGATHER, SCRIPT, "together"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "failed: " not in done.stderr  # it is told by each, and of none
    assert re.search(r"Root Cause[^=]*rank +: [01][^=]*ValueError: what all are told", done.stderr)


def test_a_process_that_is_killed_ends_a_run_of_accelerate_launch():
    done = subprocess.run([*ACCELERATE, SCRIPT, "kill"], capture_output=True, text=True, timeout=120, check=False)
    ended = time.time()
    assert done.returncode != 0
    assert "rank 1 failed: it ended without a word" in done.stderr
    # The other one had noted SIGTERM, for which torch's launcher waits 30 s.
    assert "SIGTERM again" in done.stderr
    failed_at = re.search(r"failing at ([\d.]+)", done.stdout)
    assert failed_at is not None
    assert ended - float(failed_at[1]) < 20


def test_signals_are_passed_on():
    with subprocess.Popen([*FORGATHER, SCRIPT, "wait"], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for _ in range(2):
            assert "of 2: 2" in running.stdout.readline()
        running.send_signal(signal.SIGUSR1)
        assert running.wait(60) == 75
        assert sorted(running.stdout.read().split()) == ["SIGUSR1", "SIGUSR1"]
