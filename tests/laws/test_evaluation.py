"""Law 8: an evaluation does not depend on how its data is cut into batches."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn.testing import check_evaluation
from tests import specimens, zoo


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
@pytest.mark.parametrize("name", sorted(zoo.SPECIMENS))
@settings(max_examples=2)
@given(data=st.data(), samples=st.integers(3, 9))
def test_the_batch_size_does_not_matter(name: str, storage: str, data: st.DataObject, samples: int) -> None:
    sizes = data.draw(st.none() | st.lists(st.integers(1, samples + 2), min_size=2, max_size=3, unique=True))
    check_evaluation(data.draw(zoo.plans(name, storage)), zoo.SPECIMENS[name].batch(samples), batch_sizes=sizes)


def test_a_stream_brings_its_collate() -> None:
    x, y = specimens.ragged_classes(7)
    samples = [(x[i].tolist(), int(y[i])) for i in range(7)]

    def collate(rows: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])

    check_evaluation(zoo.plan_of("mlp"), ff.batches(samples, batch_size=4, collate=collate))


class Sampling(nn.Module):
    """Draws in evaluation too: dropout that was written as a function, and forgets the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.body(nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize(
    "model", [Sampling, lambda: nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3))]
)
def test_a_model_that_mixes_or_draws_is_caught(model: Any) -> None:
    pattern = r"with params='params', 6 samples in batches of \d do not .* in batches of 6: 'loss' differs by"
    with pytest.raises(AssertionError, match=pattern):
        check_evaluation(zoo.plan_of("mlp", model=model), zoo.SPECIMENS["mlp"].batch(6), batch_sizes=(6, 4, 2))


class Recording(nn.Module):
    """Changes a buffer and the mode in evaluation."""

    calls: Tensor

    def __init__(self, *, switches: bool) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.switches = switches

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.switches:
            self.body.train()
        return self.body(x)


@pytest.mark.parametrize("switches", [False, True])
def test_buffers_and_modes_are_put_back(switches: bool) -> None:
    model = Recording(switches=switches)
    check_evaluation(zoo.plan_of("mlp", model=model), zoo.SPECIMENS["mlp"].batch(4))


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="2 samples cannot be cut unequally; give at least 3"):
        check_evaluation(zoo.plan_of("mlp"), zoo.SPECIMENS["mlp"].batch(2))
