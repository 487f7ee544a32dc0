"""Law 9: an epoch is a permutation, and a stream depends on its seed alone."""

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import get_worker_info

import forgather_fn as ff
from forgather_fn.testing import check_data
from tests import zoo


class Noisy:
    """Draws from every global generator for each sample."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(5) + random.random() + np.random.rand(), index % 3


def padded(rows: list[Any]) -> Tensor:
    """Pad to the longest of the batch, so that a sample looks different in another one."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)


def jittered(rows: list[Any]) -> Tensor:
    """Draw once for the whole batch."""
    return torch.stack([torch.as_tensor(row) for row in rows]) + torch.rand(())


DATASETS: dict[str, dict[str, Any]] = {
    "columns": {"dataset": {"x": torch.arange(20.0).reshape(10, 2), "y": np.arange(10)}},
    "pairs": {"dataset": [(float(i), {"name": str(i)}) for i in range(7)]},
    "one": {"dataset": torch.zeros(1, 2)},
    "noisy": {"dataset": Noisy(), "random": True},
    "padded": {"dataset": [list(range(n + 1)) for n in range(11)], "collate": padded},
    "jittered": {"dataset": [float(n) for n in range(8)], "collate": jittered, "random": True},
}


@pytest.mark.parametrize("kind", sorted(DATASETS))
@settings(max_examples=4)
@given(
    batch_size=st.integers(1, 6),
    order=st.sampled_from(["shuffled", "torch", "sequential"]),
    last=st.sampled_from(["span", "ragged", "drop"]),
    epochs=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**40),
    own_seed=st.none() | st.integers(0, 9),
)
def test_a_stream_depends_on_its_seed_alone(
    kind: str, batch_size: int, order: Any, last: Any, epochs: int | None, seed: int, own_seed: int | None
) -> None:
    assume(last != "drop" or batch_size <= len(DATASETS[kind]["dataset"]) or kind == "columns")
    stream = ff.batches(batch_size=batch_size, order=order, last=last, epochs=epochs, seed=own_seed, **DATASETS[kind])
    check_data(stream, seed=seed, batches=4)


@pytest.mark.parametrize("storage", sorted(zoo.STORAGES))
@pytest.mark.parametrize("name", ["dropout", "batchnorm", "reassigning"])
@pytest.mark.parametrize("last", ["span", "ragged", "drop"])
def test_a_program_goes_on_where_the_state_says(name: str, storage: str, last: Any) -> None:
    plan = zoo.plan_of(
        name,
        viewed_elements=zoo.STORAGES[storage],
        microbatches=2,
        transforms=zoo.TRANSFORMS["chain"],
        average=ff.ema(0.5),
    )
    check_data(ff.batches(zoo.SPECIMENS[name].batch(7), batch_size=3, last=last), plan=plan)


class ByWorker:
    """Gives other samples in a worker."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> float:
        return index + (0.5 if get_worker_info() else 0.0)


class ByRank(ByWorker):
    """Gives other samples on another rank."""

    def __getitem__(self, index: int) -> float:
        return index + int(os.environ.get("RANK", "0"))


class ByCall(ByWorker):
    """Gives other samples each time, from a generator of its own that nobody puts back."""

    def __init__(self) -> None:
        self.own = random.Random(0)

    def __getitem__(self, index: int) -> float:
        return index + self.own.random()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (ByWorker(), "fetched with workers=2, the batch of 4 samples at sample 0 of the job is another: data: 4 of 4"),
        (ByRank(), "fetched again, the batch of 4 samples at sample 0 of the job is another: data: 4 of 4"),
        (ByCall(), "fetched again, the batch of 4 samples at sample 0 of the job is another: data: 4 of 4"),
    ],
    ids=["worker", "rank", "call"],
)
def test_a_dataset_that_depends_on_more_than_the_index_is_caught(dataset: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=f"data: {message}"):
        check_data(ff.batches(dataset, batch_size=4))


def test_a_loader_is_not_a_stream() -> None:
    with pytest.raises(
        ValueError, match=r"expected a stream as ff.batches\(dataset, batch_size=...\) makes it, got a list"
    ):
        check_data([torch.zeros(2)])  # type: ignore[arg-type]
