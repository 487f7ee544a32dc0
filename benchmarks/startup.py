"""The ``import`` rows: what this library takes beyond ``import torch``, and what the trainers take.

Names are imported when they are first used, so what a program needs is measured as well as the import.

Each process reads its CPU time three times: at its start, when torch is there, and when this library is. Two processes,
one without the last import, would differ by more than is looked for: ``import torch`` alone varies by 0.1 s and more.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Final

from benchmarks.measure import spread
from benchmarks.table import Reach, Table

ROUNDS: Final = 21
LIMIT: Final = 0.05
"""Seconds of CPU time."""

USED: Final = "import forgather_fn as ff; ff.Plan, ff.adamw, ff.single, ff.batches, ff.fold"
"""What the shortest program names."""

TRAINER_LIMIT: Final = 0.35
"""Of what importing transformers' own trainer and arguments takes, torch included."""

TRAINERS: Final = ("forgather.ml", "transformers")

PROGRAM: Final = """
import time
began = time.process_time()
import torch
between = time.process_time()
{statement}
print(between - began, time.process_time() - between)
"""


def run(quick: bool) -> Iterator[Table]:
    """Start processes, one after the other."""
    rounds = 1 if quick else ROUNDS
    for statement in ("import forgather_fn", USED):
        cpu_seconds(statement)  # not counted: it writes byte code, and fills the disk's cache
    imported, used = zip(*((cpu_seconds("import forgather_fn"), cpu_seconds(USED)) for _ in range(rounds)), strict=True)
    lines = {
        "import torch": [torch for torch, _ in (*imported, *used)],
        "import forgather_fn, after it": [more for _, more in imported],
        f"{USED}, after it": [more for _, more in used],
    }
    yield Table(
        title=f"Import: {rounds} fresh processes for each",
        columns=("statement", "CPU s"),
        lines=tuple((text, spread(values, 1.0)) for text, values in lines.items()),
        reach=tuple(
            Reach(f"CPU seconds that {what} adds", statistics.median(more for _, more in found), LIMIT)
            for what, found in (("the import", imported), ("the import, with what a program names,", used))
        ),
        results=tuple({"statement": text, "cpu": values} for text, values in lines.items()),
    )

    if find_spec("transformers"):
        yield _trainers(rounds)


def _trainers(rounds: int) -> Table:
    """Compare what it takes until there is a trainer to be made."""
    statements = {package: f"from {package} import Trainer, TrainingArguments" for package in TRAINERS}
    for statement in statements.values() if rounds > 1 else ():
        cpu_seconds(statement)
    found = {p: [sum(cpu_seconds(text)) for _ in range(rounds)] for p, text in statements.items()}
    mine, theirs = (statistics.median(found[package]) for package in TRAINERS)
    return Table(
        title=f"Import of trainers: {rounds} fresh processes each, torch included",
        columns=("statement", "CPU s"),
        lines=tuple((statements[package], spread(values, 1.0)) for package, values in found.items()),
        reach=(Reach("forgather.ml's share of what transformers' takes", mine / theirs, TRAINER_LIMIT),),
        results=tuple({"statement": statements[package], "cpu": values} for package, values in found.items()),
    )


def cpu_seconds(statement: str) -> tuple[float, float]:
    """Import torch, then what a statement imports, in a fresh process; give the seconds of CPU time of each.

    Raises:
        ValueError: The process failed.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "",  # what is installed has its byte code, so this library must have it too
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"{statement} failed: {ended.stderr.strip()}")
    torch, more = map(float, ended.stdout.split())
    return torch, more
