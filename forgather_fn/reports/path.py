"""Paths that cannot be used, told with their name; and files that are read, and replaced, as a whole."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

LARGEST: Final = 2**30
"""Bytes of the largest file that is read as a whole."""


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], expected: str) -> Iterator[None]:
    """Turn the operating system's refusal of a path into an error that names the path and the fix.

    Args:
        path: As the user gave it.
        expected: What it should have been.

    Raises:
        ValueError: The block raised an ``OSError``.

    Example:
        >>> with naming("nowhere/x", "a file to read"):
        ...     open("nowhere/x")
        Traceback (most recent call last):
        ValueError: cannot use 'nowhere/x': No such file or directory; expected a file to read
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot use {os.fspath(path)!r}: {error.strerror or error}; expected {expected}") from error


def made_directory(path: str | os.PathLike[str]) -> Path:
    """Make a directory for files, with its parents; it may be there already.

    Raises:
        ValueError: It cannot be made, is none, or may not be written to.
    """
    place, expected = Path(path), "a directory in which files can be created"
    with naming(place, expected):
        place.mkdir(parents=True, exist_ok=True)
    if not os.access(place, os.W_OK | os.X_OK):  # some writers create their file in a thread, where errors are lost
        raise ValueError(f"cannot use {os.fspath(place)!r}: no permission to write; expected {expected}")
    return place


def checked(path: str | os.PathLike[str], what: str) -> str:
    """Give a path as text.

    Raises:
        ValueError: It is none; ``what`` is the call that it was given to.
    """
    found = path if isinstance(path, str) else os.fspath(path) if isinstance(path, os.PathLike) else None
    if not isinstance(found, str) or not found or "\0" in found or (not found.isprintable() and _is_no_text(found)):
        raise ValueError(f"{what}: expected a path, got {path!r}")
    return found


def _is_no_text(path: str) -> bool:
    """Tell characters that no name of a file has; those that Python makes of other bytes are names."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return True
    return False


def content_of(path: str | os.PathLike[str]) -> bytes:
    """Read a file, without waiting for a pipe.

    Raises:
        OSError: It cannot be read, or is no regular file; to be told by :func:`naming`.
        ValueError: It is too large to be read as a whole.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(file, "rb") as held:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("it is no regular file")
        if found.st_size > LARGEST:
            raise ValueError(
                f"{os.fspath(path)!r} has {found.st_size} bytes, and is read as a whole: more than the {LARGEST} that "
                "are read"
            )
        return held.read(LARGEST)


def replace(path: Path, content: bytes) -> None:
    """Put another file in the place of one, so that there is always one of them, and what it was stays on an error.

    Raises:
        OSError: It cannot be written.
    """
    sibling = path.with_name(f"{path.name}.tmp")
    sibling.unlink(missing_ok=True)  # what a kill has left; a link would lead elsewhere
    try:
        with sibling.open("xb") as file:
            file.write(content)
            file.flush()
            # A rename may reach the disk before the content does.
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            sibling.chmod(stat.S_IMODE(path.stat().st_mode))
        sibling.replace(path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise
