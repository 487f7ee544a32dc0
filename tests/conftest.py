"""One thread, one profile: every run of the suite does the same thing."""

import atexit
import os
import shutil
import signal
import tempfile

# Read by torch in the processes that tests start. How a sum is split over threads decides its last bits, and the
# laws compare bits between processes.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A shell starts what runs in the background with Ctrl-C ignored, and so would be the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Runs that can be controlled are noted in a home of the tests; its path is short enough for sockets.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="f", dir="/tmp")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
