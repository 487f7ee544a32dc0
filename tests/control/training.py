"""A run that can be controlled, for processes of their own."""

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import toolz
import torch
from torch import distributed

import forgather_fn as ff
from forgather_fn.reports import jsonl
from tests.toys import classifier, labelled, labelled_batches, program

STEPS = 10**6
"""More than any test waits for."""


def train(run: str, logs: bool = True, pace: float = 0.002, **options: Any) -> int:
    """Train until told to end, and give the last step; on all processes, where there are several."""
    torch.set_num_threads(1)
    made = program(classifier(), microbatches=2)
    if distributed.is_initialized():
        made = ff.accelerated(made.plan, accelerator_args={"cpu": True})

    def data():
        for seed in itertools.count():
            time.sleep(pace)
            yield labelled(6, seed=seed)

    reports = [ff.every(5, ff.report(jsonl(Path(run) / "metrics.jsonl")))] if logs else []
    with ff.serve(run, **options) as inbox:
        return toolz.pipe(
            made.steps(made.init(0), data()),
            ff.every(STEPS, ff.saved(run)),
            ff.every(STEPS, ff.evaluated(labelled_batches(2))),
            *reports,
            ff.controlled(inbox),
            ff.until(steps=STEPS),
            ff.last,
        ).step


def exit_with(run: str, logs: bool, options: dict[str, Any]) -> None:
    """Train, as the whole of a process: its exit code is 0 after an orderly end."""
    train(run, logs, **options)
    sys.exit(0)
