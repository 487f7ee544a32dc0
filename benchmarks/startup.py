"""The ``import`` row: what ``import forgather_fn`` takes beyond ``import torch``, in fresh processes.

Each process reads its CPU time three times: at its start, when torch is there, and when this library is. Two processes,
one without the last import, would differ by more than is looked for: ``import torch`` alone varies by 0.1 s and more.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

from benchmarks.measure import spread
from benchmarks.table import Reach, Table

ROUNDS: Final = 21
LIMIT: Final = 0.05
"""Seconds of CPU time."""

PROGRAM: Final = """
import time
began = time.process_time()
import torch
between = time.process_time()
import {package}
print(between - began, time.process_time() - between)
"""


def run(quick: bool) -> Iterator[Table]:
    """Start processes, one after the other."""
    cpu_seconds("forgather_fn")  # not counted: it writes byte code, and fills the disk's cache
    pairs = [cpu_seconds("forgather_fn") for _ in range(1 if quick else ROUNDS)]
    torch, more = ([pair[i] for pair in pairs] for i in range(2))
    both = [sum(pair) for pair in pairs]
    lines = {"import torch": torch, "import torch, forgather_fn": both, "the difference, by process": more}
    yield Table(
        title=f"Import: {len(pairs)} fresh processes",
        columns=("statement", "CPU s"),
        lines=tuple((text, spread(values, 1.0)) for text, values in lines.items()),
        reach=(Reach("CPU seconds that forgather_fn adds", statistics.median(more), LIMIT),),
        results=tuple({"statement": text, "cpu": values} for text, values in lines.items()),
    )


def cpu_seconds(package: str) -> tuple[float, float]:
    """Import torch, then a package, in a fresh process; give the seconds of CPU time of each.

    Raises:
        ValueError: The process failed.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "",  # what is installed has its byte code, so this library must have it too
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PROGRAM.format(package=package)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"import {package} failed: {ended.stderr.strip()}")
    torch, more = map(float, ended.stdout.split())
    return torch, more
