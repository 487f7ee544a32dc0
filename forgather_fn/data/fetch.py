"""What a dataset may be, and how the samples of one batch are read from it."""

from collections.abc import Mapping, Sized
from functools import partial
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset, default_collate

from forgather_fn.data.tables import ReadTable, Texts, frame_columns, is_table

Indices: TypeAlias = npt.NDArray[np.int64]
Column: TypeAlias = Tensor | npt.NDArray[Any] | Texts
Columns: TypeAlias = Column | dict[str, Column] | tuple[Column, ...]

MSG_NOT_INDEXED: Final = (
    "a {kind} cannot be indexed, or has no length: batches() finds sample i of a job by its index. Give a list, a "
    "tensor, a numpy array (a memory map too), a dict of them, or a dataset that has __len__ and __getitem__ (for a "
    "DataLoader, its .dataset). A source that is only iterated gives a stream of its own kind, in batches()."
)


class Reseed(Protocol):
    """Prepares the global generators for a draw."""

    def __call__(self, stream: str, row: int, /) -> None:
        """Seed them for one row of the batch, under the name of what is about to draw."""


class Collate(Protocol):
    """Makes a batch out of samples."""

    def __call__(self, samples: list[Any], /) -> Any:
        """Give what the model gets."""


class Samples(Protocol):
    """Fetches the samples of a batch."""

    def __call__(self, indices: Indices, reseed: Reseed, /) -> list[Any]:
        """Give them in the order of their dataset indices, reseeding before each draw."""
        ...


class Read(Protocol):
    """Fetches a batch."""

    def __call__(self, indices: Indices, reseed: Reseed, /) -> Any:
        """Give what the model gets for these dataset indices, reseeding before each draw."""


@runtime_checkable
class MapDataset(Protocol):
    """A dataset that knows its length and can be indexed: a sequence, or torch's map-style ``Dataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@attrs.frozen(eq=False)
class Source:
    """A dataset, ready to be read.

    Attributes:
        read: Fetches a batch.
        sized: Has the dataset's length, now.
        joint: Whether samples are fetched or collated together, so that what is drawn at random depends on the batch.
    """

    read: Read
    sized: Sized
    joint: bool


def source(dataset: Any, collate: Collate | None) -> Source:
    """Find out how a dataset is read.

    Args:
        dataset: A tensor or a numpy array; a mapping, a tuple or a ``TensorDataset`` of them, of one length; a pandas
            ``DataFrame``; a ``Dataset`` of Hugging Face, whose columns come as tensors if it has no format of its own;
            or any :class:`MapDataset`, whose ``__getitems__(list of indices)`` is used if it has one.
        collate: Makes a batch of a list of samples. None slices tensors and arrays without a Python loop, and gives the
            samples of other datasets to ``torch.utils.data.default_collate``.

    Raises:
        ValueError: The dataset can be iterated only, or its columns are not tensors or arrays of one length.
    """
    if collate is None and is_table(dataset):
        return Source(ReadTable(dataset), dataset, joint=False)
    columns = _columns(dataset)
    if columns is not None and collate is None:
        return Source(partial(sliced, columns), next(iter(_checked(columns).values()), ()), joint=False)
    given = samples_of(dataset)
    chosen = default_collate if collate is None else collate
    return Source(partial(collated, given.samples, chosen), given.sized, joint=given.joint or collate is not None)


@attrs.frozen(eq=False)
class Given:
    """How the samples of a dataset are read.

    Attributes:
        samples: Fetches some.
        sized: Has the dataset's length, now.
        joint: Whether they are fetched together, so that what is drawn at random depends on the batch.
    """

    samples: Samples
    sized: Sized
    joint: bool


def samples_of(dataset: Any) -> Given:
    """Find out how single samples of a dataset are read.

    Raises:
        ValueError: As :func:`source`.
    """
    columns = _columns(dataset)
    if columns is not None:
        return Given(partial(rows, columns), next(iter(_checked(columns).values()), ()), joint=False)
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, MapDataset):
        raise ValueError(MSG_NOT_INDEXED.format(kind=type(dataset).__name__))
    joint = _fetches_together(dataset)
    return Given(partial(together if joint else one_by_one, dataset), dataset, joint)


def sliced(columns: Columns, indices: Indices, reseed: Reseed, /) -> Any:
    """Slice columns: the batch has their structure, and memory of its own."""
    index = torch.from_numpy(indices)
    if isinstance(columns, dict):
        return {name: _taken(column, index) for name, column in columns.items()}
    if isinstance(columns, tuple):
        return tuple([_taken(column, index) for column in columns])
    return _taken(columns, index)


def collated(samples: Samples, collate: Collate, indices: Indices, reseed: Reseed, /) -> Any:
    """Fetch samples, then collate them."""
    fetched = samples(indices, reseed)
    reseed("collate", 0)
    return collate(fetched)


def one_by_one(dataset: Any, indices: Indices, reseed: Reseed, /) -> list[Any]:
    """Fetch each sample by ``__getitem__``."""
    samples = []
    for row, index in enumerate(indices.tolist()):
        reseed("sample", row)
        samples.append(dataset[index])
    return samples


def together(dataset: Any, indices: Indices, reseed: Reseed, /) -> list[Any]:
    """Fetch all samples by one ``__getitems__``, the method that torch's own loader looks for."""
    reseed("fetch", 0)
    samples: list[Any] = dataset.__getitems__(indices.tolist())
    if len(samples) != len(indices):
        raise ValueError(
            f"{type(dataset).__name__}.__getitems__ returned {len(samples)} samples for {len(indices)} indices"
        )
    return samples


def rows(columns: Columns, indices: Indices, reseed: Reseed, /) -> list[Any]:
    """Slice columns, and cut them into samples for a collate function."""
    taken = sliced(columns, indices, reseed)
    if isinstance(taken, dict):
        return [{name: column[row] for name, column in taken.items()} for row in range(len(indices))]
    if isinstance(taken, tuple):
        return [tuple(column[row] for column in taken) for row in range(len(indices))]
    return list(taken)


def _columns(dataset: Any) -> Columns | None:
    """Give the columns of a dataset that is made of them, and None for any other."""
    if isinstance(dataset, Tensor | np.ndarray):
        return dataset
    frame = frame_columns(dataset)
    if frame is not None:
        return frame
    if isinstance(dataset, Mapping):
        return dict(dataset.items())
    if type(dataset) is TensorDataset:  # a subclass may read its tensors in a way of its own
        return dataset.tensors
    if isinstance(dataset, tuple) and dataset and all(isinstance(item, Tensor | np.ndarray) for item in dataset):
        return dataset
    return None


def _checked(columns: Columns) -> dict[str, Column]:
    """Name the columns, and make sure that rows can be taken from all of them alike."""
    if isinstance(columns, dict):
        named = {repr(name): column for name, column in columns.items()}
    else:
        named = {str(i): column for i, column in enumerate(columns if isinstance(columns, tuple) else [columns])}
    for name, column in named.items():
        if not isinstance(column, Tensor | np.ndarray | Texts):
            raise ValueError(
                f"column {name} of the dataset is a {type(column).__name__}: expected a tensor or a numpy array. For "
                "other samples, give a list of them, or a dataset that has __len__ and __getitem__."
            )
        if column.ndim == 0:
            raise ValueError(f"column {name} of the dataset has no dimensions: expected one row a sample")
        if isinstance(column, np.ndarray):
            try:
                torch.from_numpy(np.empty(0, column.dtype))
            except (TypeError, ValueError) as error:
                raise ValueError(f"column {name} of the dataset has dtype {column.dtype}: {error}") from None
    lengths = {name: len(column) for name, column in named.items()}
    if len(set(lengths.values())) > 1:
        first, *others = lengths
        other = next(name for name in others if lengths[name] != lengths[first])
        raise ValueError(
            f"the columns of the dataset differ in length: {first} has {lengths[first]} rows and {other} has "
            f"{lengths[other]}. Every column needs one row a sample."
        )
    return named


def _taken(column: Column, index: Tensor) -> Tensor | list[str]:
    """Copy rows. A view could be changed by the step, and a worker would share all of the storage behind it."""
    if isinstance(column, Tensor):
        return column.index_select(0, index if column.device.type == "cpu" else index.to(column.device))
    if isinstance(column, Texts):
        texts: list[str] = column.values[index.numpy()].tolist()
        return texts
    return torch.from_numpy(column[index.numpy()])


def _fetches_together(dataset: Any) -> bool:
    # torch's Subset always has the method, and falls back to one by one: then draws need not depend on the batch.
    if type(dataset) is Subset:
        return _fetches_together(dataset.dataset)
    return callable(getattr(dataset, "__getitems__", None))
