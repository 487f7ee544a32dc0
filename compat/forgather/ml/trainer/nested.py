"""Nested tensors: detached, joined along their batches with padding, and turned into arrays of numpy."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import numpy as np
import torch
from torch import Tensor

from forgather_fn.world import World

T = TypeVar("T")

PADDING = -100
"""What fills the gaps where sequences of different lengths are joined."""


def mapped(function: Callable[[Any], Any], nest: Any) -> Any:
    """Apply a function to every leaf of nested sequences and mappings."""
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(mapped(function, item) for item in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(mapped(function, item) for item in nest)
    if isinstance(nest, Mapping):
        return type(nest)({name: mapped(function, item) for name, item in nest.items()})  # type: ignore[call-arg]
    return function(nest)


def detached(nest: Any) -> Any:
    """Take tensors out of the graph."""
    return mapped(lambda item: item.detach() if isinstance(item, Tensor) else item, nest)


def as_numpy(nest: Any) -> Any:
    """Turn tensors into arrays; bfloat16, which numpy has not, becomes float32."""

    def convert(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        item = item.detach().cpu()
        return (item.float() if item.dtype == torch.bfloat16 else item).numpy()

    return mapped(convert, nest)


def plain_numbers(nest: Any) -> Any:
    """Turn numbers of numpy and tensors of one element into numbers of Python."""

    def convert(item: Any) -> Any:
        if isinstance(item, np.generic) or (isinstance(item, Tensor) and item.numel() == 1):
            return item.item()
        return item

    return mapped(convert, nest)


def joined(parts: list[Any], padding: int = PADDING) -> Any:
    """Join nests of one structure along their first dimension; the second is padded on the right to the longest.

    Raises:
        TypeError: Their structures differ, or they hold something that cannot be joined.
    """
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise TypeError(f"batches of different kinds cannot be joined: {sorted({type(p).__name__ for p in parts})}")
    if isinstance(first, list | tuple):
        return type(first)(joined([part[i] for part in parts], padding) for i in range(len(first)))
    if isinstance(first, Mapping):
        return type(first)({name: joined([part[name] for part in parts], padding) for name in first})  # type: ignore[call-arg]
    if isinstance(first, Tensor):
        return _joined_tensors([torch.atleast_1d(part) for part in parts], padding)  # type: ignore[no-untyped-call]
    if isinstance(first, np.ndarray | np.generic):
        arrays = [torch.from_numpy(np.atleast_1d(part)) for part in parts]
        return _joined_tensors(arrays, padding).numpy()
    raise TypeError(f"Unsupported type for concatenation: got {type(first)}")


def _joined_tensors(parts: list[Tensor], padding: int) -> Tensor:
    if parts[0].dim() < 2 or len({part.shape[1] for part in parts}) == 1:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    rows = sum(part.shape[0] for part in parts)
    result = parts[0].new_full((rows, width, *parts[0].shape[2:]), padding)
    start = 0
    for part in parts:
        result[start : start + part.shape[0], : part.shape[1]] = part
        start += part.shape[0]
    return result


def interleaved(parts: list[list[T]]) -> list[T]:
    """Bring what processes have of rounds back into one order: the first of each, then the second, and so on.

    Example:
        >>> interleaved([[1, 3, 5], [2, 4]])
        [1, 2, 3, 4, 5]
    """
    longest = max((len(part) for part in parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


@attrs.define(eq=False)
class Gathered:
    """What an evaluation keeps of its batches, joined once, at the end.

    Attributes:
        join: Whether batches are joined along their first dimension; otherwise they stay a list.
    """

    join: bool
    _tensors: list[Any] = attrs.field(factory=list)
    _arrays: list[Any] = attrs.field(factory=list)

    def add(self, nest: Any) -> None:
        """Take a batch."""
        self._tensors.append(nest)

    def to_numpy(self) -> None:
        """Move what is kept to the CPU."""
        self._arrays += [as_numpy(nest) for nest in self._tensors]
        self._tensors.clear()

    def gather(self, world: World) -> None:
        """Take the batches that other processes keep too, each in its place."""
        self.to_numpy()
        self._arrays = interleaved(world.gather(self._arrays))

    def result(self) -> Any:
        """Give all batches as arrays; None if there was none."""
        self.to_numpy()
        if not self._arrays:
            return None
        return joined(self._arrays) if self.join else self._arrays
