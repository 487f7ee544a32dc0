"""Which process this is: by the environment, as launchers set it, and among real processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from forgather.ml.distributed import DistributedEnvironment, StaticDistributedEnvironment, from_launcher

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process_and_no_group() -> None:
    made = DistributedEnvironment(device="cpu")
    assert (made.rank, made.local_rank, made.world_size, made.local_world_size) == (0, 0, 1, 1)
    assert (made.device, made.device_type, made.is_main_process) == (torch.device("cpu"), "cpu", True)
    assert not distributed.is_initialized()
    made.close()


def test_a_launchers_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("5", "1", "8", "4", "there", "1234"), strict=True):
        monkeypatch.setenv(name, value)
    made = StaticDistributedEnvironment(**from_launcher("cpu"))
    assert (made.rank, made.local_rank, made.world_size, made.local_world_size) == (5, 1, 8, 4)
    assert (made.master_addr, made.master_port, made.is_main_process) == ("there", 1234, False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert StaticDistributedEnvironment(**from_launcher("cpu")).local_world_size == 2
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK='first' is no number"):
        from_launcher("cpu")


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=2 of world_size=2"):
        StaticDistributedEnvironment(rank=2, world_size=2)


def test_a_group_of_one_is_opened_when_asked_for_and_closed() -> None:
    with DistributedEnvironment(device="cpu", always=True) as made:
        assert distributed.get_world_size() == 1
        inner = DistributedEnvironment(device="cpu", always=True)
        inner.close()  # it did not open the group
        assert distributed.is_initialized()
        made.close()
        assert not distributed.is_initialized()
    assert not distributed.is_initialized()


SCRIPT = """
import torch
from torch import distributed
from forgather.ml.distributed import DistributedEnvironment

with DistributedEnvironment(device="cpu", timeout=60.0) as here:
    summed = torch.tensor(float(here.rank + 1))
    distributed.all_reduce(summed)
    print(here.rank, here.world_size, here.backend, summed.item())
assert not distributed.is_initialized()
"""


def test_two_processes_find_each_other(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "compat")])
    both = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [one.communicate(timeout=120) for one in both]
    assert [one.returncode for one in both] == [0, 0], answers
    assert [out.strip() for out, _ in answers] == ["0 2 gloo 3.0", "1 2 gloo 3.0"]
