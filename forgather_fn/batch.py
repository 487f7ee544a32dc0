"""Batches: what a step consumes, and how it is cut into microbatches."""

from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from forgather_fn.data import Batch
from forgather_fn.losses import leading_dimension
from forgather_fn.share import Microbatches, Share, cut
from forgather_fn.tree import rebuilt


def as_batch(batch: Any) -> Batch:
    """Wrap plain data as a batch of as many samples as its leading dimension."""
    if not isinstance(batch, Batch):
        return Batch(batch, leading_dimension(batch), None)
    if type(batch.samples) is not int or batch.samples < 0:
        raise ValueError(f"Batch: samples is an integer of at least 0, which positions count; got {batch.samples!r}")
    return batch


def check_batches(data: Any) -> None:
    """Make sure that data which is iterated gives batches.

    Raises:
        ValueError: It is one batch, or a dataset, whose items are samples.
    """
    if isinstance(data, Dataset) and hasattr(type(data), "__getitem__"):
        what = f"the items of a dataset ({type(data).__name__}) are samples"
    elif isinstance(data, Mapping | Tensor) or (isinstance(data, tuple) and any(isinstance(x, Tensor) for x in data)):
        what = f"a {type(data).__name__} is one batch; one batch alone is [batch]"
    elif not isinstance(data, Iterable) or isinstance(data, str | bytes):
        what = f"a {type(data).__name__} has none"
    else:
        return
    raise ValueError(f"expected a stream or an iterable of batches: {what}. Use ff.batches(data, batch_size=...)")


def outline(data: Any) -> str:
    """Tell the types and shapes of a batch, for a message; numbers and None beside them are left out.

    Example:
        >>> outline({"x": torch.zeros(8, 3), "names": ["a", "b"], "scale": 1.0})
        "{'x': float32 [8, 3], 'names': list}"
    """
    if isinstance(data, Tensor):
        return f"{str(data.dtype).removeprefix('torch.')} {list(data.shape)}"
    if isinstance(data, Mapping):
        told = {name: outline(item) for name, item in data.items() if item is not None and not isinstance(item, Number)}
        return f"{{{', '.join(f'{name!r}: {what}' for name, what in told.items())}}}"
    if isinstance(data, tuple):
        return f"({', '.join(map(outline, data))})"
    return type(data).__name__


def as_it_came(batch: Batch) -> list[Any]:
    """Give the data of a batch, or the microbatches as which it came to this process."""
    return list(batch.data.items) if isinstance(batch.data, Microbatches) else [batch.data]


def placed(data: Any, device: torch.device, floating: torch.dtype | None) -> Any:
    """Move a batch's tensors to a device, and floating ones to a data type if one is given; share what is there."""
    if isinstance(data, Tensor):
        wanted = floating if floating is not None and data.is_floating_point() else data.dtype
        if data.device == device and data.dtype == wanted:
            return data
        return data.to(device=device, dtype=wanted, non_blocking=True)
    if isinstance(data, Mapping):
        return {name: placed(item, device, floating) for name, item in data.items()}
    if isinstance(data, Microbatches):
        return Microbatches(tuple([placed(part, device, floating) for part in data.items]), data.first)
    if isinstance(data, tuple | list):
        return rebuilt(data, [placed(item, device, floating) for item in data])
    return data


def microbatches(batch: Batch, count: int) -> list[Any]:
    """Cut a batch into near-equal microbatches along its leading dimension.

    They differ by at most one sample, the larger ones first. A batch that ends an epoch (``ragged``) may have
    fewer samples than microbatches; empty ones are left out.

    Args:
        batch: Tensors of equal leading dimension; lists of that length are cut too; numbers, strings, None and
            zero-dimensional tensors go to every one. Data that are :class:`Microbatches` are cut already.
        count: How many microbatches.

    Raises:
        ValueError: The batch has fewer samples than microbatches and is not ragged, or the leading dimension of a
            tensor is not the number of samples.
    """
    if isinstance(batch.data, Microbatches):
        if not 1 <= len(batch.data.items) <= count:
            raise ValueError(
                f"the batch comes as {len(batch.data.items)} microbatches, but the plan has microbatches={count}"
            )
        return list(batch.data.items)
    if count == 1:
        return [batch.data]
    if batch.samples < count and not batch.ragged:
        raise ValueError(
            f"microbatches={count}, but the batch has {batch.samples} samples: each microbatch needs at least one. "
            "Use a larger batch_size or fewer microbatches."
        )
    return [_cut(batch.data, rows.start, rows.stop, batch.samples, "batch") for rows in cut(batch.samples, count)]


def owned(batch: Batch, share: Share) -> list[tuple[int, Any]]:
    """Give the microbatches of a process, each with its number among all of the step.

    Args:
        batch: Of the whole step, equal on every process; or with the process's own
            :class:`~forgather_fn.share.Microbatches`.
        share: Which are its own.

    Raises:
        ValueError: As :func:`microbatches`.
    """
    if isinstance(batch.data, Microbatches) and batch.data.first:
        return list(enumerate(batch.data.items, batch.data.first))
    return [
        (number, part) for number, part in enumerate(microbatches(batch, share.microbatches)) if number in share.block
    ]


def _cut(data: Any, start: int, stop: int, samples: int, path: str) -> Any:
    if isinstance(data, Mapping):
        return {name: _cut(item, start, stop, samples, f"{path}/{name}") for name, item in data.items()}
    if isinstance(data, Tensor) and data.dim() > 0:
        if data.shape[0] != samples:
            raise ValueError(
                f"{path} has leading dimension {data.shape[0]}, but the batch has {samples} samples: it cannot be cut "
                "into microbatches. Expand it to one row a sample."
            )
        return data[start:stop]
    if isinstance(data, list) and len(data) == samples and not any(isinstance(item, Tensor) for item in data):
        return data[start:stop]
    if isinstance(data, tuple | list):
        return rebuilt(data, [_cut(item, start, stop, samples, f"{path}/{i}") for i, item in enumerate(data)])
    return data
