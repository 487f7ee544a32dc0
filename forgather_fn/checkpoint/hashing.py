"""Hashes of files, in pieces: the one of a large file would keep one core busy while the others wait for it."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import attrs

from forgather_fn.checkpoint import system

PIECE: Final = 1 << 26
"""Bytes that are hashed one after the other. Larger files are hashed in pieces of that size, the last a shorter one."""

_BUFFER: Final = 1 << 20


@attrs.frozen
class Written:
    """A file that is on the disk.

    Attributes:
        size: In bytes.
        sha256: Of its content, in hexadecimal; where there are several pieces, of the sha256 of each, in a row.
        piece: Of how many bytes the pieces are, but for the last; None where the file is one piece.
    """

    size: int
    sha256: str
    piece: int | None = None

    @property
    def starts(self) -> Sequence[int]:
        """At which bytes the pieces begin."""
        return range(0, self.size, self.piece) if self.piece else (0,)


class Mapped(Protocol):
    """Apply a function to items, in order, as ``map`` and an executor's ``map`` do."""

    def __call__(self, function: Callable[[int], bytes], items: Iterable[int], /) -> Iterable[bytes]:
        """Give what it gives for each."""
        ...


def sha256(path: Path, written: Written) -> str:
    """Hash a file's content, in the pieces in which it was hashed when it was written."""
    return joined(hashes(path, written, map))


def hashed(path: Path) -> Written:
    """Hash a file that others have written."""
    size = path.stat().st_size
    written = Written(size, "", PIECE if size > PIECE else None)
    return attrs.evolve(written, sha256=sha256(path, written))


def hashes(path: Path, written: Written, mapped: Mapped) -> Iterable[bytes]:
    """Hash each piece of a file; :func:`joined` makes one of them.

    Args:
        path: The file.
        written: In which pieces it was hashed when it was written; the last goes on to the end of the file.
        mapped: ``map``, or that of a pool of threads.
    """
    starts, piece = written.starts, written.piece
    return mapped(lambda start: _hashed(path, start, None if start == starts[-1] else piece), starts)


@contextlib.contextmanager
def comparing(directory: Path, files: Mapping[str, Written]) -> Iterator[Callable[[], list[str]]]:
    """Hash files on all cores, while something else is done with them.

    Args:
        directory: Where they lie.
        files: What each was when it was written, by name.

    Yields:
        A function that waits for the hashes, and names the files whose content is another, or cannot be read.
    """

    def faults() -> list[str]:
        wrong = {name: _fault(pieces, files[name]) for name, pieces in found.items()}
        return [f"{name}{why}" for name, why in wrong.items() if why]

    with ThreadPoolExecutor(max_workers=_cores(), thread_name_prefix="checkpoint") as pool:
        found = {name: hashes(directory / name, written, pool.map) for name, written in files.items()}
        yield faults


def _fault(pieces: Iterable[bytes], written: Written) -> str:
    try:
        return "" if joined(pieces) == written.sha256 else ": its content was changed (sha256 differs)"
    except OSError as error:
        return f" cannot be read: {error.strerror}"


def _cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def joined(pieces: Iterable[bytes]) -> str:
    """Make the hash of a file of those of its pieces."""
    found = list(pieces)
    return (found[0] if len(found) == 1 else hashlib.sha256(b"".join(found)).digest()).hex()


def _hashed(path: Path, start: int, length: int | None) -> bytes:
    """Hash a part of a file; without a length, all that follows."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    with system.read_file(path) as file:
        file.seek(start)
        while length is None or length > 0:
            read = file.readinto(buffer if length is None else buffer[:length])
            if not read:
                break
            digest.update(buffer[:read])
            length = None if length is None else length - read
    return digest.digest()


@attrs.define
class Hash:
    """The hash of a file that is being written."""

    size: int = 0
    _pieces: list[bytes] = attrs.field(factory=list)
    _last: "hashlib._Hash" = attrs.field(factory=hashlib.sha256)

    def update(self, data: memoryview) -> None:
        """Add bytes to its end."""
        while data:
            if self.size and self.size % PIECE == 0:
                self._pieces.append(self._last.digest())
                self._last = hashlib.sha256()
            part = data[: PIECE - self.size % PIECE]
            self._last.update(part)
            self.size += len(part)
            data = data[len(part) :]

    def written(self) -> Written:
        """Give what is to be known of the file."""
        return Written(self.size, joined([*self._pieces, self._last.digest()]), PIECE if self._pieces else None)
