"""What a dataset may be, and what is read from it."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from forgather_fn import data
from forgather_fn.data import batches
from forgather_fn.data.loading import Fetch, Request, keyed, undrawn
from tests.streams import Squares, columns, taken


def read_only(tmp_path: Path) -> Any:
    np.arange(12, dtype=np.uint16).tofile(tmp_path / "tokens")
    return np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")


@pytest.mark.parametrize("workers", [0, 1])
def test_columns_are_sliced(tmp_path: Path, workers: int) -> None:
    given = columns()
    expected = next(batches(torch.arange(12), batch_size=5).start(0, 0)).data
    ids, weight = given["ids"][expected], torch.from_numpy(given["weight"])[expected]

    def first(dataset: Any) -> Any:
        (batch,) = taken(batches(dataset, batch_size=5, workers=workers).start(0, 0), 1)
        return batch.data

    assert torch.equal(first(given["ids"]), ids)
    assert torch.equal(first(given["weight"]), weight)
    assert first(read_only(tmp_path)).tolist() == expected.tolist()
    assert list(first(given)) == ["ids", "weight"]
    for pair in (
        first(given).values(),
        first((given["ids"], given["weight"])),
        first(TensorDataset(given["ids"], torch.from_numpy(given["weight"]))),
    ):
        assert all(torch.equal(one, other) for one, other in zip(pair, (ids, weight), strict=True))


def test_a_batch_has_memory_of_its_own(tmp_path: Path) -> None:
    for dataset in (torch.arange(6), np.arange(6), read_only(tmp_path)):
        for batch in batches(dataset, batch_size=2, order="sequential", epochs=1).start(0, 0):
            batch.data.zero_()
        assert dataset.tolist() == list(range(len(dataset)))


class Doubled(TensorDataset):
    """Reads its tensors in a way of its own."""

    def __getitem__(self, index: int) -> Any:
        return self.tensors[0][index] * 2


class Joint(Squares):
    """Can fetch a whole batch at once, and only so."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError("__getitems__ is used where it is present")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        assert all(type(index) is int for index in indices)
        return [index * 10 for index in indices]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ([10, 11, 12, 13], [10, 11, 12]),
        (range(10, 14), [10, 11, 12]),
        (("a", "b", "c", "d"), ["a", "b", "c"]),
        (Doubled(torch.arange(4)), [0, 2, 4]),
        (Joint(4), [0, 10, 20]),
        (Subset(Joint(9), [4, 5, 6, 7]), [40, 50, 60]),
        (Subset([0, 1, 2, 3, 4], [4, 3, 2, 1]), [4, 3, 2]),  # type: ignore[arg-type]
    ],
)
def test_samples_are_collated(dataset: Any, expected: list[Any]) -> None:
    (batch,) = taken(batches(dataset, batch_size=3, order="sequential").start(0, 0), 1)
    assert (batch.data if isinstance(batch.data, list) else batch.data.tolist()) == expected


def test_samples_of_a_dataset_are_what_torch_makes_of_them() -> None:
    (batch,) = taken(batches(Squares(4), batch_size=4, order="sequential").start(0, 0), 1)
    (expected,) = DataLoader(Squares(4), batch_size=4)
    assert list(batch.data) == list(expected)
    assert all(torch.equal(batch.data[name], expected[name]) for name in expected)


def test_collate_gets_samples() -> None:
    def first(dataset: Any) -> Any:
        (batch,) = taken(batches(dataset, batch_size=2, order="sequential", collate=list).start(0, 2), 1)
        return batch.data

    assert first(["a", "b", "c", "d"]) == ["c", "d"]
    assert [row.tolist() for row in first(columns()["ids"])] == [[4, 5], [6, 7]]
    assert [(list(row), row["ids"].tolist()) for row in first(columns())] == [
        (["ids", "weight"], [4, 5]),
        (["ids", "weight"], [6, 7]),
    ]
    assert [(ids.tolist(), weight.dtype) for ids, weight in first(tuple(columns().values()))] == [
        ([4, 5], torch.float64),
        ([6, 7], torch.float64),
    ]


DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    "dataset",
    [
        columns(),
        [1, 2, 3],
        Squares(3),
        data.mixture({"one": [1, 2], "other": Squares(2)}, weights=lambda position: {"one": 1, "other": 2}),
        data.packed(DOCUMENTS, length=3),
        data.best_fit(DOCUMENTS, length=3),
    ],
    ids=["columns", "list", "dataset", "mixture", "packed", "best_fit"],
)
def test_fetching_is_pickled(dataset: Any) -> None:
    # As for workers that are spawned, not forked.
    request = Request(0, np.zeros(2, np.int64), np.array([2, 0]), seed=0, first=True)
    if isinstance(dataset, data.Mixture):  # whose samples are numbers, and mappings
        request = Request(0, np.zeros(2, np.int64), np.array([1, 0]), seed=0, first=True)
    for guard in (undrawn, keyed):
        fetch = Fetch(batches(dataset, batch_size=2)._source.read, guard)
        assert str(pickle.loads(pickle.dumps(fetch))[request]) == str(fetch[request])


@pytest.mark.gpu
def test_columns_on_a_device() -> None:
    on_device = {"x": torch.arange(10, device="cuda")}
    (batch,) = taken(batches(on_device, batch_size=4).start(0, 0), 1)
    assert batch.data["x"].is_cuda
    assert batch.data["x"].tolist() == list(batch.indices)  # type: ignore[arg-type]


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class Iterable(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], r"the dataset \(a list\) is empty"),
        (torch.empty(0, 3), "is empty"),
        ({}, "is empty"),
        (iter([1]), r"a list_iterator can be read only once.*Give what makes it"),
        (Iterable(), "a Iterable is read one sample after the other.*order='sequential'"),
        (Unsized(), "has no length"),
        (DataLoader([1, 2]), r"DataLoader, its \.dataset"),  # type: ignore[arg-type]
        ({"a": torch.zeros(3), "b": np.zeros(2)}, "'a' has 3 rows and 'b' has 2"),
        ((torch.zeros(3), torch.zeros(2)), "0 has 3 rows and 1 has 2"),
        ({"a": torch.zeros(3), "b": [1, 2, 3]}, "column 'b' of the dataset is a list"),
        ({"a": torch.zeros(())}, "column 'a' of the dataset has no dimensions"),
        (np.array(["x", "y"]), "column 0 of the dataset has dtype <U1"),
    ],
)
def test_refused_datasets(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(dataset, batch_size=2)


def test_a_joint_fetch_gives_every_sample() -> None:
    class Short(Squares):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return indices[1:]

    with pytest.raises(ValueError, match=r"Short\.__getitems__ returned 3 samples for 4 indices"):
        next(batches(Short(10), batch_size=4).start(0, 0))
