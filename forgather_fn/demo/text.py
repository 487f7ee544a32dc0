"""Real text, in two parts: the source of Python's standard library, or any file or folder."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

import attrs
import torch
from torch import Tensor

from forgather_fn.reports.path import naming

SHARE: Final = 0.05
"""About how much of a text is held out for evaluation."""

_NOT_THE_LIBRARY: Final = ("site-packages", "dist-packages")


@attrs.frozen(eq=False)
class Text:
    """A text in two parts: what is trained on, and what is held out for evaluation.

    Attributes:
        training: Bytes, uint8, shape (bytes,).
        held_out: As ``training``.
        description: Where it is from, how large it is, and how it was split, in one line.
    """

    training: Tensor
    held_out: Tensor
    description: str

    @property
    def digest(self) -> str:
        """Name what the two parts hold: 12 hexadecimal digits."""
        digest = hashlib.sha256(self.training.numpy().data)
        digest.update(self.held_out.numpy().data)
        return digest.hexdigest()[:12]


@attrs.frozen(eq=False)
class Windows:
    """Windows of a text, one after the other: a map-style dataset, read a batch at a time.

    Attributes:
        rows: Bytes, uint8, shape (windows, context).
    """

    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index].long()

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return list(self.rows[torch.tensor(indices)].long().unbind())

    def spread(self, most: int) -> "Windows":
        """Choose at most so many windows, evenly spaced: always the same ones."""
        return Windows(self.rows[:: -(-len(self) // most)])


def windows(text: Tensor, context: int) -> Windows:
    """Cut a text into windows of ``context`` bytes; what is left at its end is left out.

    Example:
        >>> windows(torch.arange(7, dtype=torch.uint8), context=3)[1].tolist()
        [3, 4, 5]
    """
    return Windows(text[: len(text) // context * context].view(-1, context))


def training_windows(text: Text, context: int) -> Windows:
    """Cut what is trained on into windows."""
    return windows(text.training, context)


def held_out_windows(text: Text, context: int, most: int = 256) -> Windows:
    """Cut what is held out into windows, and choose at most so many of them."""
    return windows(text.held_out, context).spread(most)


def labelled(samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Collate windows to a batch; they are the labels as well, since the loss compares each byte with the next."""
    input_ids = torch.stack(tuple(samples))
    return {"input_ids": input_ids, "labels": input_ids}


def read(path: str | Path | None, context: int) -> Text:
    """Read a text and split it.

    Of a folder, all files at any depth are read, by their sorted relative paths, except hidden ones, and those that
    hold a NUL byte and so are no text; of the standard library, those named ``*.py``, without what was installed.

    Args:
        path: A file or a folder; None for the standard library of the running Python.
        context: How many bytes the model sees at once.

    Raises:
        ValueError: There is nothing at the path, it cannot be read, or the text in it is too short for a window in
            each part.
    """
    path = None if path is None else Path(path)
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        source = f"the standard library of Python {platform.python_version()}"
        names = [name for name in _names(root, _NOT_THE_LIBRARY) if name.endswith(".py")]
    elif path.is_file():
        root, source, names = path.parent, str(path), [path.name]
    else:
        root, source, names = path, str(path), _names(path, ())
    files = {}
    for name in names:
        with naming(root / name, "a file that can be read"):
            files[name] = (root / name).read_bytes()
    text = {name: content for name, content in files.items() if b"\0" not in content}
    size = sum(map(len, text.values()))
    found = f"{source}: {size:,} bytes of text (files: {len(text):,}, left out as no text: {len(files) - len(text):,})"
    if size < 2 * context:
        raise ValueError(
            f"{found}; expected at least {2 * context}, a window of context={context} bytes to train on and one to "
            "evaluate with. Give more text, or a smaller context"
        )
    training, held_out, how = split(text, context)
    return Text(_tensor(training), _tensor(held_out), f"{found}; held out for evaluation: {how}")


def is_held_out(name: str) -> bool:
    """Decide by its relative path whether a file is for evaluation: about 5 % are, the same on every machine.

    What other files there are does not matter, so that a file does not change sides when some are added or removed.

    Example:
        >>> [name for name in ("gzip.py", "hashlib.py", "heapq.py", "html/parser.py") if is_held_out(name)]
        ['gzip.py', 'hashlib.py']
    """
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") < SHARE * 2**64


def split(files: Mapping[str, bytes], context: int) -> tuple[bytearray, bytearray, str]:
    """Split files by :func:`is_held_out`; where that leaves a part without a window, hold out the end of the text.

    Args:
        files: Contents by relative path; two windows or more.
        context: Bytes in a window.

    Returns:
        The text to train on, the text held out, and which that is, in words.
    """
    held = {name for name in files if is_held_out(name)}
    training = bytearray().join(content for name, content in files.items() if name not in held)
    held_out = bytearray().join(content for name, content in files.items() if name in held)
    if min(len(training), len(held_out)) >= context:
        return training, held_out, f"{len(held_out):,} bytes (files: {len(held):,}, by a hash of their paths)"
    whole = bytearray().join(files.values())
    count = len(whole) // context
    cut = (count - max(1, round(SHARE * count))) * context
    return whole[:cut], whole[cut:], f"the last {len(whole) - cut:,} bytes"


def _tensor(text: bytearray) -> Tensor:
    return torch.frombuffer(text, dtype=torch.uint8)


def _names(root: Path, left_out: Collection[str]) -> list[str]:
    """List the files under a folder by relative path, sorted; without hidden ones and the folders left out."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    found: list[str] = []
    with naming(root, "a file of text, or a folder of such files"):
        for folder, folders, files in os.walk(root, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
            paths = [Path(folder, name) for name in files if not name.startswith(".")]
            found += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(found)
