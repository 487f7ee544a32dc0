"""What a model keeps between batches is that of one device, whatever a process runs of other stages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forgather_fn as ff
from forgather_fn.checkpoint import load
from forgather_fn.testing.processes import Processes, processes

CUTS = {
    "GPipe": {"second": "end"},
    "ZBVZeroBubble": {"first_norm": "end", "second_norm": "end", "third": "end"},
    "LoopedBFS": {"first": "end", "second": "end", "third_norm": "end"},
}


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    with processes(2) as pool:
        yield pool


class Images(nn.Module):
    """Norms without parameters, of which several run in front of a cut; what they give is written over in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)
        self.second, self.second_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.third, self.third_norm = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("largest", None)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        hidden = nn.functional.relu_(self.first_norm(self.first(images)))
        hidden = nn.functional.relu_(self.second_norm(self.second(hidden)))
        hidden = nn.functional.relu_(self.third_norm(self.third(hidden))).mean((2, 3))
        self.largest = hidden.detach().amax(0)
        return self.head(hidden) / (1 + 0.1 * self.calls)


def trained(
    schedule: str, run: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
    torch.manual_seed(0)
    plan = ff.Plan(
        model=Images().double(),
        loss=ff.losses.cross_entropy,
        optimizer=ff.adamw(eps=1e-6),
        schedule=1e-2,
        microbatches=4,
    )
    alone = schedule == "one device"
    program = ff.single(plan) if alone else ff.pipelined(plan, CUTS[schedule], schedule=schedule)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(11, 3, 5, 5, generator=generator).double(), torch.randint(0, 3, (11,), generator=generator)
    data = ff.batches(images, batch_size=8, last="ragged")  # the second batch has three microbatches
    state = ff.last(ff.until(steps=3)(program.steps(program.init(), data)))
    measured = program.evaluate(state, [images])
    ff.checkpoint.save(program, state, run)
    exported = program.export(state).state_dict()
    return dict(state.params), load(run).tensors["model"], measured, dict(exported)


@pytest.mark.parametrize("schedule", CUTS)
def test_buffers_are_those_of_one_device(two: Processes, tmp_path: Path, schedule: str) -> None:
    params, saved, measured, exported = trained("one device", str(tmp_path / "one"))
    for own, kept, found, taken in two.run(trained, schedule, str(tmp_path / "two")):
        close: Any = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(own, {name: params[name] for name in own}, **close)
        torch.testing.assert_close({name: kept[name] for name in saved}, saved, **close)
        torch.testing.assert_close(taken, exported, **close)
        assert found == pytest.approx(measured, rel=1e-12)
