"""Law 6: any stages, schedule and number of processes agree with one device."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from forgather_fn.pipeline.schedules import KINDS
from forgather_fn.testing.processes import Processes, processes
from tests.pipeline import runs
from tests.pipeline.models import MODELS

NAMES = [kind.name for kind in KINDS.values()]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Processes]]:
    with processes(2) as two, processes(4) as four:
        yield {2: two, 4: four}


@functools.cache
def one_device(name: str, microbatches: int) -> runs.Found:
    return runs.single(name, {"microbatches": microbatches})


def assert_alike(found: list[runs.Found], one: runs.Found, tolerance: float) -> None:
    assert set().union(*(run.params for run in found)) == set(one.params)
    for run in found:
        for name, tensor in run.params.items():
            torch.testing.assert_close(tensor, one.params[name], rtol=0, atol=tolerance)
        for step, (mine, others) in enumerate(zip(run.metrics, one.metrics, strict=True)):
            # The squares of the norm are added in other groups; after the first step, parameters differ as well, and
            # norms by the curvature times that.
            norm = 1e-6 if step == 0 or not tolerance else 20 * tolerance
            assert mine.keys() == others.keys()
            for name, value in others.items():
                assert mine[name] == pytest.approx(value, rel=norm if name == "grad_norm" else tolerance, abs=1e-12)
        assert run.evaluated == pytest.approx(one.evaluated, rel=tolerance, abs=1e-12)
    first = {name: tensor for run in reversed(found) for name, tensor in run.params.items()}
    for run in found:  # the copies of tied parameters are one, to the bit
        assert all(torch.equal(tensor, first[name]) for name, tensor in run.params.items())


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(
    ("ranks", "name"), [*((2, name) for name in MODELS), *((4, name) for name in ("plain", "llama", "gpt2"))]
)
def test_pipelines_agree_with_one_device(pools: Any, ranks: int, name: str, schedule: str) -> None:
    stages = ranks * (KINDS[schedule.lower()].stages or 2)
    microbatches = max(4, stages if KINDS[schedule.lower()].fills else 0)
    found = pools[ranks].run(runs.pipelined, name, schedule, stages, {"microbatches": microbatches})
    reordered = schedule == "LoopedBFS"  # it runs backward passes from the last microbatch to the first
    tolerance = 5e-6 if MODELS[name].tied else 1e-6 if reordered else 0.0
    assert_alike(found, one_device(name, microbatches), tolerance)
