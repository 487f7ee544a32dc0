"""Paths that cannot be used, told with their name."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
