"""Comparing an optimizer with a reference that somebody else wrote, after every step."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import forgather_fn as ff
from tests.toys import VIEWED, assert_same_tensors, classifier, labelled_batches, mean_cross_entropy, program

STORAGES = pytest.mark.parametrize("viewed_elements", [VIEWED, 0], ids=["views", "own"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-12}
RATE = ff.schedules.cosine(peak=3e-2, warmup=4, total=25)


def compare(
    ours: ff.Optimizer,
    theirs: Callable[[nn.Module], Any],
    *,
    model: Callable[[torch.dtype], nn.Module] = classifier,
    batches: Iterable[Any] | None = None,
    dtype: torch.dtype = torch.float64,
    schedule: Callable[[int], float] = RATE,
    steps: int = 20,
    atol: float | None = None,
    look: Callable[[ff.TrainState, nn.Module, Any], None] = lambda state, module, optimizer: None,
    **changes: Any,
) -> None:
    """Train with both on the same batches, and compare the parameters after every step.

    Args:
        ours: The optimizer.
        theirs: ``model -> torch optimizers``, one or several: the reference.
        model: Makes the model, always the same.
        batches: What it is trained on.
        dtype: In which data type.
        schedule: The learning rate by step; it is written to the reference's groups, times their ``factor``.
        steps: How many.
        atol: How far they may be apart; the rounding of the type if not given.
        look: Looks further after every step.
        changes: Of the plan.
    """
    module = model(dtype)
    made = theirs(module)
    optimizers = made if isinstance(made, list) else [made]
    mine = program(model(dtype), optimizer=ours, schedule=schedule, **changes)
    state = mine.init(0)
    for step, batch in enumerate(batches or labelled_batches(steps, dtype=dtype)):
        state, _ = mine.step(state, batch)
        for optimizer in optimizers:
            for row in optimizer.param_groups:
                row["lr"] = schedule(step) * row.get("factor", 1.0)
            optimizer.zero_grad(set_to_none=True)
        mean_cross_entropy(module, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_same_tensors(state, module, atol=ROUNDING[dtype] if atol is None else atol)
        look(state, module, made)
