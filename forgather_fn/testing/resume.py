"""Law 4: a run that is saved, restored and continued is the run that was never interrupted."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import toolz

from forgather_fn.checkpoint import save, verify
from forgather_fn.data import Stream
from forgather_fn.endings import until
from forgather_fn.loop import Stage, last
from forgather_fn.plan import Plan
from forgather_fn.program import Program
from forgather_fn.state import TrainState, difference
from forgather_fn.testing.subject import sizes, subject


def check_checkpoint(plan: Plan, batch: Any, *, steps: int = 2, seed: int = 0) -> None:
    """Check that a saved state is read back to the bit, by a program that has never seen it.

    Args:
        plan: A module in it is copied.
        batch: What the state is trained on before it is saved, that often.
        steps: How often.
        seed: The job's.

    Raises:
        AssertionError: It names the leaf that differs, or the file that is damaged.

    Example:
        >>> import torch, forgather_fn as ff
        >>> plan = ff.Plan(model=torch.nn.Linear(3, 1), loss=ff.losses.mse, optimizer=ff.adamw(), schedule=0.1)
        >>> check_checkpoint(plan, (torch.ones(4, 3), torch.zeros(4, 1)))
    """
    made = subject(plan, seed)
    state = made.first
    for _ in range(steps):
        state, _ = made.program.step(state, batch)
    with tempfile.TemporaryDirectory() as run:
        path = save(made.program, state, run)
        faults = verify(path)
        if faults:
            raise AssertionError(f"checkpoint: it is damaged as soon as it is written: {'; '.join(faults)}")
        found = difference(state, subject(plan, seed + 1).program.restore(path))
    if found:
        raise AssertionError(
            f"checkpoint: after {steps} steps of {sizes(plan, batch)}, it is read back otherwise: {found}"
        )


def check_resume(
    plan: Plan, stream: Stream, *, steps: int = 6, seed: int = 0, stages: Callable[[], Iterable[Stage]] = tuple
) -> None:
    """Check that a run can be left and taken up at every step, and ends at the same bits.

    For every k, the run is saved at step k, restored by a program that has never seen it, and continued.

    Args:
        plan: A module in it is copied.
        stream: What it is trained on.
        steps: How long the run is.
        seed: The job's.
        stages: Makes the stages that the run goes through, anew for each part of it.

    Raises:
        AssertionError: It names the step at which the run was left, and the first leaf that differs at its end.

    Example:
        >>> import torch, forgather_fn as ff
        >>> plan = ff.Plan(model=torch.nn.Linear(3, 1), loss=ff.losses.mse, optimizer=ff.adamw(), schedule=0.1)
        >>> check_resume(plan, ff.batches((torch.ones(8, 3), torch.zeros(8, 1)), batch_size=4), steps=3)
    """
    with tempfile.TemporaryDirectory() as directory:
        whole = subject(plan, seed)
        expected = _run(whole.program, whole.first, stream, steps, stages(), Path(directory))
        for k in range(steps):
            program = subject(plan, seed + 1).program
            state = program.restore(Path(directory) / f"{k}")
            if state.step != k:
                raise AssertionError(f"resume: what was saved at step {k} is restored as step {state.step}")
            found = difference(expected, _run(program, state, stream, steps, stages(), None))
            if found:
                raise AssertionError(
                    f"resume: a run of {steps} steps, left and taken up at step {k}, ends otherwise: {found} "
                    f"(batch_size={stream.batch_size}, microbatches={plan.microbatches})"
                )


def _run(
    program: Program, state: TrainState, stream: Stream, steps: int, stages: Iterable[Stage], runs: Path | None
) -> TrainState:
    """Run to a step, saving every state on the way, where a directory is given, as a run of its own."""
    ticks = toolz.pipe(program.steps(state, stream), *stages, until(steps=steps))
    if runs is None:
        final: TrainState = last(ticks)
        return final
    final = ticks.state
    save(program, final, runs / f"{final.step}")
    for tick in ticks:
        final = tick.state
        save(program, final, runs / f"{final.step}")
    return final
