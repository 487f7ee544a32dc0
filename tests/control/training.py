"""A run that can be controlled, for processes of their own."""

import itertools
import sys
import time
from pathlib import Path

import toolz
import torch

import forgather_fn as ff
from forgather_fn.report import jsonl
from forgather_fn.world import ALONE
from tests.toys import classifier, labelled, labelled_batches, program

STEPS = 10**6
"""More than any test waits for."""


def train(run: str, logs: bool = True, world=ALONE, pace: float = 0.002, **options) -> int:
    """Train until told to end, and give the last step; each process saves to a directory of its own."""
    torch.set_num_threads(1)
    made = program(classifier(), microbatches=2)
    saves = run if world.main else f"{run}-{world.rank}"

    def data():
        for seed in itertools.count():
            time.sleep(pace)
            yield labelled(6, seed=seed)

    reports = [ff.every(5, ff.report(jsonl(Path(saves) / "metrics.jsonl")))] if logs else []
    with ff.serve(run, **options) as inbox:
        return toolz.pipe(
            made.steps(made.init(0), data()),
            ff.every(STEPS, ff.saved(saves)),
            ff.every(STEPS, ff.evaluated(labelled_batches(1))),
            *reports,
            ff.controlled(inbox, world=world),
            ff.until(steps=STEPS),
            ff.last,
        ).step


def exit_with(run: str, logs: bool, options: dict) -> None:
    """Train, as the whole of a process: its exit code is 0 after an orderly end."""
    train(run, logs, **options)
    sys.exit(0)
