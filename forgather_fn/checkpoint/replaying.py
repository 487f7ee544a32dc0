"""Replay: any step of a run, executed again to the bit, to look at what happened there."""

from collections.abc import Mapping
from pathlib import Path

import attrs
from torch import nn

from forgather_fn.checkpoint import state_file
from forgather_fn.checkpoint.catalog import list_checkpoints
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.data import Stream
from forgather_fn.program import Program
from forgather_fn.stages import Observer, at


@attrs.frozen
class Replay:
    """What one step did.

    Attributes:
        step: Its number: how many batches had been consumed before it.
        restored: The checkpoint from which it was reached; None for the first state, which a factory's model has anew.
        indices: Which samples of the dataset it consumed; None if they have no numbers, since it is read in sequence.
        metrics: Its loss, norms and learning rate, with the norm of each parameter's gradient.
    """

    step: int
    restored: Path | None
    indices: tuple[int, ...] | None
    metrics: Mapping[str, float]


def replay(program: Program, run: str | Path, data: Stream, *, step: int) -> Replay:
    """Execute a step of a run again: from the nearest earlier checkpoint, over the same batches, to the bit.

    Args:
        program: Of the plan that the run was made by.
        run: The run directory.
        data: The stream that it was trained on.
        step: How many batches had been consumed before the step: 0 is the first.

    Raises:
        CheckpointError: No whole checkpoint is that early, and the plan's model is no factory.
        ValueError: The stream ends before, or the step is less than 0.
    """
    if step < 0:
        raise ValueError(f"replay: step={step}: the first step is 0")
    whole = [entry for entry in list_checkpoints(run) if entry.whole and entry.manifest]
    earlier = [entry for entry in whole if entry.step <= step]
    if earlier:
        nearest = max(earlier, key=lambda entry: entry.step)
        state = program.restore(nearest.path)
    elif whole and not isinstance(program.plan.model, nn.Module):
        seed = int(state_file.read(whole[0].path)["seed"])
        state = program.init(seed)  # a factory's first state depends on that alone
    else:
        raise CheckpointError(f"{run} has no whole checkpoint at step {step} or before")
    look = at(step + 1, Observer(lambda tick: None, wants=frozenset({"gradient_norms"})))
    for tick in look(program.steps(state, data)):
        if tick.state.step == step + 1:
            metrics = {name: float(value) for name, value in tick.metrics.items()}
            found = tick.batch.indices
            indices = None if found is None else tuple(int(i) for i in found)
            return Replay(step, nearest.path if earlier else None, indices, metrics)
    raise ValueError(f"{run}: the stream ends before step {step}")
