"""What a step does outside of the model: counted, since counts do not depend on how busy a machine is."""

import collections
import sys
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

import forgather_fn as ff

PACKAGE = str(Path(ff.__file__).parent)


def calls_of_step(depth: int, **fields: object) -> int:
    """Count the calls of this package's Python functions in one step of a model of so many layers."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    plan = ff.Plan(
        **{"model": model, "loss": ff.losses.cross_entropy, "optimizer": ff.adamw(), "schedule": 1e-3} | fields
    )
    program = ff.single(plan)
    state = program.init(0)
    batch = torch.randn(6, 4), torch.arange(6) % 4
    for _ in range(2):  # what is known after the first steps need not be found out again
        state, _ = program.step(state, batch)
    counts: collections.Counter[str] = collections.Counter()

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            counts[event] += 1

    sys.setprofile(count)
    try:
        program.step(state, batch)
    finally:
        sys.setprofile(None)
    return counts["call"]


@pytest.mark.parametrize(
    "fields", [{}, {"transforms": (ff.clipped(1.0),)}, {"microbatches": 3}], ids=["", "clipped", "3"]
)
def test_flat_gradients_cost_the_same_calls_whatever_the_depth(fields):
    assert calls_of_step(40, **fields) == calls_of_step(4, **fields)


@pytest.mark.parametrize("optimizer", [ff.adamw, ff.sgd, ff.optim.lion, ff.optim.adafactor])
@pytest.mark.parametrize("fields", [{"viewed_elements": 0}, {"update": "in_backward"}], ids=["own", "in_backward"])
def test_gradients_of_their_own_cost_as_many_for_each(optimizer, fields):
    few, more, most = (calls_of_step(depth, optimizer=optimizer(), **fields) for depth in (20, 40, 80))
    assert most - more == 2 * (more - few)
    assert most < 45 * 160  # tensors


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_microbatch_is_weighed_once(microbatches):
    weighed = []

    def weight(batch):
        weighed.append(len(batch[1]))
        return len(batch[1])

    model = nn.Linear(4, 4)
    loss = attrs.evolve(ff.losses.cross_entropy, weight=weight)
    program = ff.single(ff.Plan(model=model, loss=loss, optimizer=ff.sgd(), schedule=1e-3, microbatches=microbatches))
    program.step(program.init(0), (torch.randn(6, 4), torch.arange(6) % 4))
    assert weighed == [6 // microbatches] * microbatches
