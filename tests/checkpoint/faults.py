"""Saves that are stopped: by a kill, by a call that fails, by a loss of power; and the processes that it is done to."""

import contextlib
import functools
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import attrs
import pytest
import torch

import forgather_fn as ff
from forgather_fn import tree
from forgather_fn.checkpoint import commit, system

NAMES = ("make_directory", "create", "write", "sync", "close", "sync_directory", "rename", "unlink", "remove_directory")
"""The system calls that a save is made of, which all go through :mod:`forgather_fn.checkpoint.system`."""

Perform = Callable[[], Any]


@attrs.frozen
class Call:
    """One system call, with the path that it is about (of an open file, where it was created)."""

    name: str
    path: Path
    args: tuple[Any, ...] = attrs.field(repr=False)


Fault = Callable[[Call, Perform], Any]
"""What becomes of a call: ``(call, how to perform it) -> its result``."""


@attrs.define
class Calls:
    """The system calls of saves, in their order, and what is to become of them."""

    fault: Callable[[int], Fault | None] = lambda index: None
    made: list[Call] = attrs.field(factory=list)
    seen: Callable[[Call, Any], None] = lambda call, result: None
    _files: dict[int, Path] = attrs.field(factory=dict)
    _lock: Any = attrs.field(factory=threading.Lock)

    @contextlib.contextmanager
    def watched(self, *, writers: int = 1) -> Iterator["Calls"]:
        """Stand between the library and the system; with one writer, the order of calls is always the same."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commit, "WRITERS", writers)
            for name in NAMES:
                patch.setattr(system, name, functools.partial(self._call, name, getattr(system, name)))
            yield self

    def _call(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        with self._lock:
            call = Call(name, self._files[args[0]] if isinstance(args[0], int) else args[0], args)
            fault = self.fault(len(self.made))
            self.made.append(call)

        def perform() -> Any:
            result = real(*args)
            if name == "create":
                self._files[result] = call.path
            self.seen(call, result)
            return result

        return perform() if fault is None else fault(call, perform)


def at(index: int, fault: Fault) -> Callable[[int], Fault | None]:
    """Let one call go wrong."""
    return lambda number: fault if number == index else None


def from_then_on(index: int, fault: Fault) -> Callable[[int], Fault | None]:
    """Let a call go wrong, and all after it."""
    return lambda number: fault if number >= index else None


def killed(call: Call, perform: Perform) -> Any:
    """End the process, without a word, in place of the call."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal may reach another thread first


def torn(then: Fault) -> Fault:
    """Write the first half of what is to be written; then something else happens."""

    def fault(call: Call, perform: Perform) -> Any:
        if call.name == "write":
            file, data = call.args
            os.write(file, data[: len(data) // 2])
        return then(call, perform)

    return fault


def failing(number: int) -> Fault:
    """Fail in place of the call. A file that cannot be closed is closed nevertheless, as by the kernel."""

    def fault(call: Call, perform: Perform) -> Any:
        if call.name == "close":
            perform()
        raise OSError(number, os.strerror(number), str(call.path))

    return fault


def late(number: int) -> Fault:
    """Fail after the call was made, as a remote file system may."""

    def fault(call: Call, perform: Perform) -> Any:
        perform()
        raise OSError(number, os.strerror(number), str(call.path))

    return fault


def short(call: Call, perform: Perform) -> Any:
    """Write one byte only, as the system may; other calls are as usual."""
    if call.name != "write":
        return perform()
    file, data = call.args
    return os.write(file, data[:1])


@attrs.define
class File:
    """A file: what was written to it, and what of that was on the disk when it was last synced."""

    written: bytes = b""
    synced: bytes = b""


@attrs.define
class Directory:
    """A directory: its entries, and those that were on the disk when it was last synced."""

    entries: dict[str, "File | Directory"] = attrs.field(factory=dict)
    synced: dict[str, "File | Directory"] = attrs.field(factory=dict)

    @property
    def holds_files(self) -> bool:
        """Whether it is that of one checkpoint."""
        return any(isinstance(child, File) and name != ".lock" for name, child in self.entries.items())


@attrs.define
class Disk:
    """What a disk holds after a loss of power: of each file and directory what was synced; nothing else is sure."""

    root: Path
    top: Directory = attrs.field(init=False)
    _open: dict[int, File] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.top = _read(self.root)

    def seen(self, call: Call, result: Any) -> None:
        """Follow a call that was made."""
        getattr(self, f"_{call.name}")(*call.args, *([result] if call.name in ("create", "write") else []))

    def _find(self, path: Path) -> Any:
        node: Any = self.top
        for name in path.relative_to(self.root).parts:
            node = node.entries[name]
        return node

    def _make_directory(self, path: Path, mode: int) -> None:
        self._find(path.parent).entries[path.name] = Directory()

    def _create(self, path: Path, file: int) -> None:
        self._open[file] = self._find(path.parent).entries[path.name] = File()

    def _write(self, file: int, data: memoryview, count: int) -> None:
        self._open[file].written += bytes(data[:count])

    def _sync(self, file: int) -> None:
        self._open[file].synced = self._open[file].written

    def _close(self, file: int) -> None:
        del self._open[file]

    def _sync_directory(self, path: Path) -> None:
        node = self._find(path)
        node.synced = dict(node.entries)

    def _rename(self, old: Path, new: Path) -> None:
        self._find(new.parent).entries[new.name] = self._find(old.parent).entries.pop(old.name)

    def _unlink(self, path: Path) -> None:
        del self._find(path.parent).entries[path.name]

    _remove_directory = _unlink

    def kept(self) -> "Layout":
        """Tell what is sure to be left."""
        return self._layout(lambda node: node.synced, lambda file: file.synced)

    def possible(self) -> Iterator["Layout"]:
        """Tell what may be left, by a file system that does things in an order of its own.

        Entries may be as they were synced or as they were last, in directories of files and in others; sizes may be
        there before the content, which is zeros then.
        """
        yield self.kept()
        yield self._layout(lambda node: node.entries, lambda file: file.synced.ljust(len(file.written), b"\0"))
        yield self._layout(lambda node: node.entries if node.holds_files else node.synced, lambda file: file.synced)
        yield self._layout(lambda node: node.synced if node.holds_files else node.entries, lambda file: file.synced)

    def _layout(self, entries: Callable[[Directory], Any], content: Callable[[File], bytes]) -> "Layout":
        def walk(node: Directory, path: Path) -> Iterator[tuple[Path, bytes | None]]:
            for name, child in entries(node).items():
                if isinstance(child, Directory):
                    yield path / name, None
                    yield from walk(child, path / name)
                else:
                    yield path / name, content(child)

        return tuple(walk(self.top, Path()))


Layout = tuple[tuple[Path, bytes | None], ...]
"""The entries of a tree: for each file its content, for each directory None, before what is in it."""


def laid_out(layout: Layout, place: Path) -> Path:
    """Make a tree of directories and files."""
    place.mkdir()
    for path, data in layout:
        if data is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(data)
    return place


def _read(path: Path) -> Directory:
    entries: dict[str, File | Directory] = {}
    for child in path.iterdir():
        data = b"" if child.is_dir() else child.read_bytes()
        entries[child.name] = _read(child) if child.is_dir() else File(data, data)
    return Directory(entries, dict(entries))


@attrs.frozen
class Ended:
    """How a child ended: its exit code, or the signal as a negative number; and what its function returned."""

    code: int
    value: Any = None


def forked(function: Callable[[], Any], *, meanwhile: Callable[[int], None] = lambda child: None) -> Ended:
    """Run a function in a child of this process.

    Args:
        function: What it returns comes back; an exception of its is written to the standard error.
        meanwhile: Called here with the child's id while it runs.
    """
    if torch.cuda.is_available():
        pytest.skip("autograd does not run in a forked child where there is a GPU")
    # A file and no pipe: workers that outlive a child that was killed would keep a pipe open.
    with tempfile.TemporaryFile() as answer:
        child = os.fork()
        if child == 0:
            _run(function, answer)
        try:
            meanwhile(child)
        finally:
            _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        answer.seek(0)
        return Ended(code, torch.load(answer, weights_only=False) if code == 0 else None)


def _run(function: Callable[[], Any], answer: IO[bytes]) -> None:
    code: Any = 1
    try:
        torch.save(function(), answer)
        answer.flush()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def leaves(state: ff.TrainState) -> dict[str, Any]:
    """Copy a whole state to what can be sent to another process and compared there."""
    return {
        path: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf
        for path, leaf in tree.walk(state.as_tree())
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare two whole states, as :func:`leaves` gives them, to the bit."""
    found = tree.difference(one, other)
    assert found is None, found


def content(directory: Path) -> dict[str, bytes]:
    """Read every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def names(run: Path) -> list[str]:
    """Name what lies where the checkpoints of a run do."""
    return sorted(path.name for path in (run / "checkpoints").glob("*"))
