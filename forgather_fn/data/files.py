"""Datasets of files: read where they lie, by memory map, so that only what a batch needs is ever in memory."""

import os
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forgather_fn.data.fetch import Indices
from forgather_fn.signature import checked


@attrs.define(eq=False)
class Mapped:
    """A file as an array. Only its path goes to worker processes, which map it themselves."""

    path: Path
    dtype: np.dtype[Any]
    _array: npt.NDArray[Any] | None = attrs.field(default=None, init=False)

    @property
    def array(self) -> npt.NDArray[Any]:
        """The mapped file."""
        if self._array is None:
            self._array = np.memmap(self.path, dtype=self.dtype, mode="r")
        return self._array

    def __getstate__(self) -> tuple[Path, np.dtype[Any]]:
        return self.path, self.dtype

    def __setstate__(self, state: tuple[Path, np.dtype[Any]]) -> None:
        self.path, self.dtype = state
        self._array = None


def _integers(given: npt.DTypeLike) -> np.dtype[Any]:
    try:
        kind = np.dtype(given)
    except (TypeError, ValueError):
        kind = np.dtype(object)
    if given is None or kind.kind not in "iu":
        raise ValueError(f"dtype={given!r}: tokens are integers: expected the type of them, such as 'uint16'")
    return kind


def _mapped(path: str | os.PathLike[str], dtype: npt.DTypeLike) -> Mapped:
    found, kind = Path(path), _integers(dtype)
    if found.is_dir():
        raise ValueError(f"{os.fspath(path)!r} is a directory: expected a file")
    size = found.stat().st_size
    if not size or size % kind.itemsize:
        raise ValueError(f"{found} has {size} bytes: expected elements of {kind}, of {kind.itemsize} bytes each")
    return Mapped(found, kind)


@attrs.frozen(eq=False)
class Tokens:
    """Windows of a file of tokens; made by :func:`memmap_tokens`."""

    length: int
    stride: int
    windows: int
    _file: Mapped

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.windows:
            raise IndexError(f"window {index} of {self.windows}")
        window = self._file.array[index * self.stride : index * self.stride + self.length]
        tokens = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


@checked
def memmap_tokens(
    path: str | os.PathLike[str], *, length: int, dtype: npt.DTypeLike = "uint16", stride: int | None = None
) -> Tokens:
    """Read windows of a file of tokens, as nanoGPT writes it (``numpy.ndarray.tofile``).

    A window is ``{"input_ids", "labels"}``, int64, shape (length,): the labels are the tokens, which a causal language
    model's loss shifts. So a window predicts ``length - 1`` tokens; with ``stride=length - 1`` each token of the file
    but the first is predicted once. What is left over at the end, too short for a window, is left out.

    Args:
        path: The file.
        length: Tokens in a window.
        dtype: Of the file.
        stride: Tokens from one window to the next; None for ``length``.

    Raises:
        ValueError: The file does not consist of such elements, is too short for one window, or a number is too small.
    """
    stride = length if stride is None else stride
    if length < 1 or stride < 1:
        raise ValueError(f"length={length}, stride={stride}: both must be at least 1")
    file = _mapped(path, dtype)
    windows = (len(file.array) - length) // stride + 1
    if windows < 1:
        raise ValueError(f"{path} has {len(file.array)} tokens: fewer than one window of {length}")
    return Tokens(length, stride, windows, file)


@checked
def text_bytes(path: str | os.PathLike[str], *, length: int, stride: int | None = None) -> Tokens:
    """Read windows of a file byte by byte: the tokens are bytes, 256 of them.

    Args:
        path: The file.
        length: Bytes in a window.
        stride: Bytes from one window to the next; None for ``length``.

    Raises:
        ValueError: As of :func:`memmap_tokens`.
    """
    return memmap_tokens(path, length=length, dtype="uint8", stride=stride)


@attrs.frozen(eq=False)
class Lines:
    """The lines of a text file; made by :func:`text_lines`."""

    encoding: str
    _ends: Indices
    _file: Mapped

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"line {index} of {len(self._ends)}")
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self._file.array[start : int(self._ends[index])].tobytes().removesuffix(b"\r").decode(self.encoding)


@checked
def text_lines(path: str | os.PathLike[str], *, encoding: str = "utf-8") -> Lines:
    """Read a text file line by line, without their ends.

    The file is looked through once for where lines end (8 bytes a line are kept); then any line is read at once.

    Args:
        path: The file.
        encoding: Of the text; one in which a line ends with the byte 10, as in UTF-8.

    Raises:
        ValueError: The file is empty, or the encoding writes ends of lines in another way.
    """
    try:
        end = "\n".encode(encoding)
    except LookupError as error:
        raise ValueError(f"text_lines: {error}") from None
    if end != b"\n":
        raise ValueError(f"encoding={encoding!r} does not end a line with the byte 10: convert the file to UTF-8")
    file = _mapped(path, "uint8")
    size, block = len(file.array), 1 << 24
    found = [np.flatnonzero(file.array[start : start + block] == 10) + start for start in range(0, size, block)]
    ends = np.concatenate(found)
    if not ends.size or ends[-1] != size - 1:
        ends = np.append(ends, size)
    return Lines(encoding, ends, file)
