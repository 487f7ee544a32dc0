"""Law 5: any number of processes gives the run of one."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
from torch import Tensor

from forgather_fn import tree
from forgather_fn.data import Stream
from forgather_fn.endings import until
from forgather_fn.plan import Plan
from forgather_fn.strategy.accelerated import accelerated
from forgather_fn.testing import processes as pools
from forgather_fn.testing.compare import LEAST_SCALE, TOLERANCE, beyond, largest, plain, snapshot
from forgather_fn.testing.subject import in_float64, own_module

_HINTS: Final = (
    "Likely causes: something draws random numbers under the rank or from a generator of its own, keeps something from "
    "one microbatch to the next, or mixes the samples of microbatches."
)

_task: dict[str, Any] = {}
"""What forked processes train: plans hold functions, which cannot be pickled."""


def check_worlds(
    plan: Plan,
    stream: Stream,
    *,
    processes: Sequence[int] = (2, 4),
    steps: int = 3,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> None:
    """Check that a run on several processes is the run on one.

    With ``reduction="tree"`` in the plan's own precision the states and metrics must have the same bits; with the
    ordinary sum, in float64, they must agree up to rounding. Buffers that the model's forward pass changes, such as the
    running statistics of a batch norm, are sequential by nature and outside of this law.

    Args:
        plan: Its microbatches are shared out among the processes. A module in it is copied.
        stream: What it is trained on.
        processes: How many, each in turn; powers of two. They are forked from this one, on the CPU.
        steps: How long the run is.
        tolerance: By how much the ordinary sum may differ, relative to the largest element of a leaf.
        seed: The job's.

    Raises:
        AssertionError: It names the number of processes, the rank, and the first leaf that differs.
        ValueError: The microbatches cannot be shared out.

    Example:
        >>> import torch, forgather_fn as ff
        >>> plan = ff.Plan(
        ...     model=torch.nn.Linear(3, 1), loss=ff.losses.mse, optimizer=ff.adamw(), schedule=0.1, microbatches=2
        ... )
        >>> check_worlds(plan, ff.batches((torch.ones(8, 3), torch.zeros(8, 1)), batch_size=4), processes=[2])
    """
    exact = attrs.evolve(plan, model=own_module(plan.model, seed))
    rounded = attrs.evolve(exact, precision="float64")
    for size in processes:
        _compare(exact, stream, steps, seed, "tree", size, 0.0)
        with in_float64():
            _compare(rounded, stream, steps, seed, "sum", size, tolerance)


def _compare(plan: Plan, stream: Stream, steps: int, seed: int, reduction: str, size: int, tolerance: float) -> None:
    _task.update(plan=plan, stream=stream, steps=steps, seed=seed, reduction=reduction)
    try:
        with pools.processes(1) as one, pools.processes(size) as many:
            (expected,) = one.run(_trained)
            ranks = many.run(_trained)
    finally:
        _task.clear()
    for rank, found in enumerate(ranks):
        odd = _difference(expected, found, tolerance)
        if odd:
            raise AssertionError(
                f'worlds: with reduction="{reduction}", rank {rank} of {size} processes ends otherwise than one '
                f"process, after {steps} steps of {plan.microbatches} microbatches: {odd}. {_HINTS}"
            )


def _trained() -> Mapping[str, Any]:
    """Train in this process, and give every leaf of the final state and of all metrics by its path."""
    plan: Plan = _task["plan"]
    program = accelerated(attrs.evolve(plan, model=own_module(plan.model, _task["seed"])), reduction=_task["reduction"])
    state, metrics = program.init(_task["seed"]), []
    for tick in until(steps=_task["steps"])(program.steps(state, _task["stream"])):
        state = tick.state
        metrics.append(snapshot(plain(tick.metrics)))
    return dict(tree.walk({"state": snapshot(state.as_tree()), "metrics": metrics}))


def _difference(expected: Mapping[str, Any], found: Mapping[str, Any], tolerance: float) -> str | None:
    if tolerance == 0.0:
        return tree.difference(expected, found)
    scale = LEAST_SCALE * max((largest(leaf) for leaf in expected.values() if _is_float(leaf)), default=1.0)
    for path, leaf in expected.items():
        if _is_float(leaf):
            gap = beyond(leaf, found[path], scale, tolerance)
            if gap:
                return f"{path} differs {gap}"
    return None


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
