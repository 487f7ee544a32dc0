"""The step on replicas as compiled graphs: one of a microbatch's gradient, one of the update, and sums between them."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from forgather_fn.built import Built
from forgather_fn.compiled import Compiled, mark_sizes
from forgather_fn.execution import Advance
from forgather_fn.flat import Flat
from forgather_fn.gradient import Gradients
from forgather_fn.mean import Mean
from forgather_fn.reduction import Counter
from forgather_fn.replicated import Replica, RunMicrobatches
from forgather_fn.state import TrainState


def graph_halves(built: Built) -> tuple[RunMicrobatches, Advance]:
    """Give the two halves of a step on replicas, as graphs."""
    compiled = Compiled(built)
    one = torch.ones((), dtype=built.dtype, device=built.device)  # gradients are of sums until all are added

    def run(
        replica: Replica, state: TrainState, microbatches: Sequence[tuple[int, Any]], samples: int, /
    ) -> tuple[list[dict[str, Mean]], Gradients, Flat]:
        built.workspace.clear()
        total = built.workspace.collect(0, 0.0).flat
        assert total is not None
        counter = Counter() if replica.in_pairs and len(microbatches) != 1 else None
        mark_sizes(
            [microbatch for _, microbatch in microbatches]
        )  # how many samples a process has may differ from step to step
        added = _nothing if counter is None else lambda: counter.take(total.buffers)
        found, active, buffers = compiled.accumulate(state, microbatches, total, one, added)
        if counter is not None:
            counter.leave(total.buffers)
        names = itertools.compress(total.layout.index, active)
        views = {name: total.alias(name) for name in names}
        return found, Gradients(total.layout, active, views, total, samples, 0.0), buffers

    return run, compiled.advance


def _nothing() -> None:
    """Do nothing."""
