"""Tables of other libraries as columns: pandas and Hugging Face datasets, neither of which is imported here."""

import sys
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
from torch import Tensor


@attrs.frozen(eq=False)
class Texts:
    """A column of strings, of which a batch has a list."""

    values: npt.NDArray[Any]
    ndim: int = 1

    def __len__(self) -> int:
        return len(self.values)


def frame_columns(dataset: Any) -> dict[str, Any] | None:
    """Give the columns of a pandas DataFrame by name, without copying what numpy can share; None for anything else.

    Raises:
        ValueError: Two columns have one name.
    """
    pandas: Any = sys.modules.get("pandas")
    if pandas is None or not isinstance(dataset, pandas.DataFrame):
        return None
    names = [str(name) for name in dataset.columns]
    if len(set(names)) < len(names):
        raise ValueError(f"two columns of the DataFrame have one name: {names}")
    is_text = pandas.api.types.is_string_dtype
    columns = [dataset.iloc[:, number] for number in range(len(names))]
    return {
        name: Texts(column.to_numpy()) if is_text(column) else column.to_numpy()
        for name, column in zip(names, columns, strict=True)
    }


def is_table(dataset: Any) -> bool:
    """Tell whether a dataset is one of Hugging Face whose rows are columns of plain values."""
    datasets: Any = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None


@attrs.frozen(eq=False)
class ReadTable:
    """Fetches batches of a table: columns of numbers as tensors, others as lists."""

    table: Any

    def __call__(self, indices: npt.NDArray[np.int64], reseed: Any, /) -> Mapping[str, Any]:
        """Give the columns of these rows.

        Raises:
            ValueError: The values of a column differ in shape.
        """
        found: Mapping[str, Any] = self.table.with_format("torch")[indices.tolist()]
        for name, column in found.items():
            if isinstance(column, list) and column and isinstance(column[0], Tensor):
                shapes = sorted({tuple(value.shape) for value in column})
                raise ValueError(
                    f"column {name!r} has values of shapes {shapes} in one batch: pad them, by "
                    "batches(..., collate=...), or pack them, by ff.data.packed"
                )
        return found
