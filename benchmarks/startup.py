"""The ``import`` row: what ``import forgather_fn`` takes beyond ``import torch``, in fresh processes."""

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

BASE: Final = "import torch"
MORE: Final = "import torch, forgather_fn"


def run(quick: bool) -> Iterator[Table]:
    """Start processes in turns."""
    times: dict[str, list[float]] = {BASE: [], MORE: []}
    for text in times:
        cpu_seconds(text)  # not counted: the first one writes byte code, and fills the disk's cache
    for turn in range(1 if quick else ROUNDS):
        for text in (BASE, MORE) if turn % 2 else (MORE, BASE):
            times[text].append(cpu_seconds(text))
    difference = statistics.median(times[MORE]) - statistics.median(times[BASE])
    yield Table(
        title=f"Import: {len(times[BASE])} fresh processes each",
        columns=("statement", "CPU s"),
        lines=tuple((text, spread(values, 1.0)) for text, values in times.items()),
        reach=(Reach("seconds that forgather_fn adds, medians", difference, LIMIT),),
        results=tuple({"statement": text, "cpu": values} for text, values in times.items()),
    )


def cpu_seconds(text: str) -> float:
    """Run statements in a fresh process, and give the CPU time of all of it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", text], env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"`{text}` ended with status {process.returncode}")
    return used.ru_utime + used.ru_stime
