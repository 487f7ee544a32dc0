"""Datasets that draw, fail or are read as columns, and what tests of streams share."""

import contextlib
import random
from collections.abc import Callable, Generator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from forgather_fn.data import Batch

ORDERS = ("shuffled", "torch", "sequential")
LASTS = ("span", "ragged", "drop")


class Squares(Dataset[dict[str, Any]]):
    """A map-style dataset without draws."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "square": torch.tensor([float(index) ** 2])}


class Noise(Squares):
    """Draws from all three generators, in a number of draws that depends on the sample."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = [[random.random(), np.random.rand(), torch.rand(()).item()] for _ in range(index % 3 + 1)]
        return {"index": index, "drawn": torch.tensor(drawn[-1], dtype=torch.float64)}


def noisy(samples: list[Any]) -> dict[str, torch.Tensor]:
    """A collate function that draws."""
    return {"index": torch.tensor(samples), "noise": torch.rand(len(samples), dtype=torch.float64)}


def taken(iterator: Generator[Batch, None, None], count: int) -> list[Batch]:
    """The next batches. The iterator is closed."""
    with contextlib.closing(iterator):
        return list(islice(iterator, count))


class Failing(Squares):
    """Does something at one sample."""

    def __init__(self, length: int, at: int, action: Callable[[], Any]) -> None:
        super().__init__(length)
        self.at, self.action = at, action

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            self.action()
        return index


def columns() -> dict[str, Any]:
    """A dataset of 12 samples."""
    return {"ids": torch.arange(24).reshape(12, 2), "weight": np.linspace(0.0, 1.0, 12)}


def same(ones: list[Batch], others: list[Batch]) -> bool:
    """Whether batches of tensors, or of mappings of them, agree to the bit."""

    def leaves(batch: Batch) -> dict[str, torch.Tensor]:
        return batch.data if isinstance(batch.data, dict) else {"data": batch.data}

    return len(ones) == len(others) and all(
        (one.samples, one.ragged) == (other.samples, other.ragged)
        and np.array_equal(one.indices, other.indices)  # type: ignore[arg-type]
        and all(torch.equal(leaves(one)[name], leaves(other)[name]) for name in leaves(one))
        for one, other in zip(ones, others, strict=True)
    )
