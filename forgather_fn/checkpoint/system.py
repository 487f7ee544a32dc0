"""The few calls of the operating system that a save is made of, each a point at which it may fail or be killed.

Everything that a checkpoint writes, moves or removes goes through here, so that a test can stop a save at any of them.
"""

import contextlib
import errno
import io
import os
import shutil
import stat
from pathlib import Path

CHUNK = 1 << 24
"""Bytes that one write takes at most, so that hashing and writing a large tensor go on side by side."""


def path_of(given: str | os.PathLike[str], what: str) -> Path:
    """Give a path that a user gave.

    Args:
        given: The path.
        what: It is for, as messages call it: ``"load"``.

    Raises:
        ValueError: It is no path: of another type, empty, or with characters that no path has.
    """
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise ValueError(f"{what}: expected the path of a directory, got {given!r}")
    try:
        odd = b"\0" in os.fsencode(given)
    except UnicodeEncodeError:
        odd = True
    if odd:
        raise ValueError(f"{what}: {str(given)!r} has characters that no path has")
    return Path(given)


def make_directory(path: Path, mode: int) -> None:
    """Make a new directory."""
    os.mkdir(path, mode)


def make_path(path: Path) -> None:
    """Make a directory, and those above it that are missing, each on the disk before anything comes into it."""
    if path.is_dir():
        return
    make_path(path.parent)
    with contextlib.suppress(FileExistsError):
        make_directory(path, 0o777)
    sync_directory(path.parent)


def create(path: Path) -> int:
    """Open a new file for writing; one that exists is an error."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def read_file(path: Path) -> io.BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: It cannot be read, or is no file: a pipe, say, would hold up whoever opens it.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return open(file, "rb")


def write(file: int, data: memoryview) -> int:
    """Write some of the data, and give how many bytes were written."""
    return os.write(file, data)


def sync(file: int) -> None:
    """Wait until a file's content is on the disk."""
    os.fsync(file)


def close(file: int) -> None:
    """Close a file."""
    os.close(file)


def sync_directory(path: Path) -> None:
    """Wait until a directory's entries are on the disk."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def rename(old: Path, new: Path) -> None:
    """Move an entry within its directory, in one step."""
    os.rename(old, new)


def unlink(path: Path) -> None:
    """Remove a file."""
    os.unlink(path)


def remove_directory(path: Path) -> None:
    """Remove an empty directory."""
    os.rmdir(path)


def free_bytes(path: Path) -> int:
    """Tell how much may be written to the disk that holds a directory."""
    return shutil.disk_usage(path).free


def write_all(file: int, data: memoryview) -> None:
    """Write all of the data."""
    while data:
        written = write(file, data[:CHUNK])
        if written <= 0:
            raise OSError(errno.EIO, "a write made no progress")
        data = data[written:]


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it, file by file; what is gone already is no error.

    Of a link the link is removed: what it leads to is not the run's, or is what something else leads to as well.
    """
    if path.is_symlink():
        unlink(path)
        return
    try:
        entries = sorted(path.iterdir())
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_symlink() or entry.is_dir():
            remove_tree(entry)
        else:
            unlink(entry)
    remove_directory(path)
