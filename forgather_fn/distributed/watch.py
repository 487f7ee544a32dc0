"""A thread that sees another process of the run end, and ends this one where it cannot end by itself.

The kernel closes the sockets of a process, however it ends, so the others know at once. A heartbeat could not tell a
process that has ended from one that holds the interpreter's lock for long; and a signal is only heard by a main thread
that listens.
"""

import contextlib
import faulthandler
import json
import math
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs

from forgather_fn.distributed import hooks
from forgather_fn.distributed.mesh import Peer, connected
from forgather_fn.distributed.words import (
    LINE_LIMIT,
    Begun,
    Failed,
    Left,
    Word,
    cause_of,
    decoded,
    encoded,
    is_broken_collective,
    told_by_another,
)
from forgather_fn.interrupt import EXIT_CODE, INTERRUPTED
from forgather_fn.world import STEP, PeerError, ProgramNumber, World

GRACE: Final = 2.0
"""Seconds in which a process ends by itself when another has failed; as many more where it was told, and is ending."""


_TOGETHER: Final = (
    "every process of a run takes part in every step, evaluation and save, of the same program, in the same order; "
    "call them on all processes, and keep what they give on one"
)
_NUMBERED: Final = " (program 1 is the one that was initialised first)"


def watching(world: World) -> "Watcher":
    """Watch over the processes of a run, each over all others; collective.

    From now on this process ends, by itself or by force, within 5 s after another one has failed, and with what that
    one has said of its error on the standard error. A process fails by an exception that nobody catches, by
    :meth:`Watcher.fail`, by ending without a word (killed, or ``os._exit``), by leaving in peace before a step that
    others have begun, and by beginning an evaluation or a save where others begin a step. Children that it forks take
    no part.

    Args:
        world: The processes; addresses are exchanged through it.

    Raises:
        ConnectionError: Another process cannot be reached.

    Example:
        >>> watch = watching(World())  # a process that has no others
        >>> watch.begin("a step")
        >>> watch.close()
    """
    watch = Watcher(world.rank, {peer.rank: peer for peer in connected(world)}, _patience(world))
    watch.start()
    return watch


def _patience(world: World) -> float:
    """Give the seconds after which a process group gives up, by which a run that hangs ends."""
    if world.control is None:
        return math.inf
    from torch import device

    timeout = world.control._get_backend(device("cpu")).options._timeout
    return float(timeout.total_seconds())


@attrs.define(eq=False, weakref_slot=True)
class Watcher:
    """What one process knows of the end of the others; made by :func:`watching`.

    Attributes:
        rank: Which process this is.
        patience: Seconds that it waits for the others to begin something.
    """

    rank: int
    _peers: dict[int, Peer]
    patience: float
    _heard: threading.Condition = attrs.field(init=False, factory=threading.Condition)
    _begun: int = attrs.field(init=False, default=0)
    _what: str = attrs.field(init=False, default=STEP)  # the last of them is
    _programs: int = attrs.field(init=False, default=0)  # how many have begun anything
    _program: int = attrs.field(init=False, default=0)  # the number of the last that has
    _others: dict[int, Begun] = attrs.field(init=False, factory=dict)  # the last word of what others have begun
    _left: dict[int, int] = attrs.field(init=False, factory=dict)  # how many steps each that left had begun
    _shortest: float = attrs.field(init=False, default=math.inf)  # of those numbers, the least
    _cause: str | None = attrs.field(init=False, default=None)  # the first failure that was heard of
    _deadline: float = attrs.field(init=False, default=math.inf)  # when this process is ended, by time.monotonic
    _told: bool = attrs.field(init=False, default=False)  # whether the training knows of the failure
    _closed: bool = attrs.field(init=False, default=False)
    _said: bool = attrs.field(init=False, default=False)  # whether the others know how this process ends
    _speaking: threading.Lock = attrs.field(init=False, factory=threading.Lock)
    _wake: tuple[socket.socket, socket.socket] = attrs.field(init=False, factory=socket.socketpair)
    _thread: threading.Thread = attrs.field(init=False)
    _undo: Callable[[], None] = attrs.field(init=False)

    def start(self) -> None:
        """Begin to watch."""
        self._thread = threading.Thread(target=self._watch, daemon=True, name="forgather-fn: watch")
        self._thread.start()
        self._undo = hooks.tell(self)

    def begin(self, what: str, /, program: ProgramNumber | None = None) -> None:
        """Note that a step begins here, or anything else that takes all processes; that is begun by all together.

        So is the first step after one of another program: what is added up would be of both.

        Raises:
            PeerError: Another process has failed, has left before this, or begins something else in its place.
        """
        if self._closed:  # at the very end of the process, where nobody hears any more
            return
        with self._heard:
            what = self._of_program(what, program)
            self._begun, self._what = self._begun + 1, what
            for rank, word in self._others.items():
                if word.number == self._begun or (word.number > self._begun and what != STEP):
                    self._compare(rank, word)
            if what != STEP:
                self._say(Begun(self._begun, what))
                self._await()
            if self._cause is None and self._shortest >= self._begun:
                return
        cause = self.cause(0.0)
        if cause is not None:
            raise cause

    def _of_program(self, what: str, program: ProgramNumber | None) -> str:
        """Say of which program something is, where that is not clear: there are several, and steps were of another."""
        if program is None:
            return what
        if not program.number:
            self._programs += 1
            program.number = self._programs
        same, self._program = self._program == program.number, program.number
        return what if same and what == STEP else self._named(what)

    def _named(self, what: str) -> str:
        """Add the program's number to what it does, where there are several."""
        if self._programs < 2 or not self._program:
            return what
        return f"{what} of program {self._program}"

    def _await(self) -> None:
        """Wait until all others have begun what this process begins, or never will."""
        end = time.monotonic() + min(self.patience, threading.TIMEOUT_MAX)
        while self._cause is None and (missing := [rank for rank in self._peers if self._number(rank) < self._begun]):
            gone = [rank for rank in missing if rank in self._left]
            if gone:
                self._know(self._parting(gone[0]))
            elif not self._heard.wait(end - time.monotonic()) and time.monotonic() >= end:
                self._fail(
                    f"rank {missing[0]} has not begun {self._what} in the {self.patience:,.0f} s in which rank "
                    f"{self.rank} has waited for it; init_process_group(timeout=...) says how long that may take"
                )

    def _number(self, rank: int) -> int:
        """Tell how many a process has begun, as far as it has said so."""
        return self._others[rank].number if rank in self._others else 0

    def fail(self, error: BaseException, /) -> None:
        """Tell the others that this process cannot go on, and why; they end at once.

        What is told is the root: of an error that another process has caused, what that one has said. One that all
        processes raise at the same point (:func:`~forgather_fn.world.known_to_all`) is not told.
        """
        if self._closed or getattr(error, "known_to_all", False):
            return
        root = told_by_another(error)
        if root is None and is_broken_collective(error):
            root = self.cause(GRACE)
        with self._heard:
            if self._cause is None and root is None:  # its own: it is not ended, so that all of its error is printed
                self._cause = cause_of(error, self.rank)
                _tell_launcher(error)
            else:
                self._know(str(root))
                self._tell()
            cause = self._cause
        assert cause is not None
        self._say(Failed(cause))

    def cause(self, seconds: float, /) -> PeerError | None:
        """Wait up to so many seconds for word of a process that has failed, or has left; None if there was none."""
        with self._heard:
            self._heard.wait_for(lambda: self._cause is not None or self._left, seconds)
            if self._cause is None and self._left:
                self._know(self._parting(min(self._left, key=lambda rank: self._left[rank])))
            if self._cause is None:
                return None
            self._tell()
            return PeerError(self._cause)

    def close(self) -> None:
        """Leave the others in peace, and watch no more."""
        if self._closed:
            return
        if self._deadline < math.inf:
            faulthandler.cancel_dump_traceback_later()
        self.leave(None)
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._undo()

    def leave(self, error: BaseException | None, /) -> None:
        """Say how this process ends, and hear no more.

        Where another has failed, this process has little time left to end, whatever holds it up.

        Args:
            error: With which it ends; None for none.
        """
        if self._closed:
            return
        if error is not None and not _is_peaceful(error):
            self.fail(error)
            if self._cause is None:  # all raise it, and so it is told to none; but the launcher is to name it
                _tell_launcher(error)
        self._say(Left(self._begun) if self._cause is None else Failed(self._cause))
        self._closed = True
        self._rouse()

    def forget(self) -> None:
        """Let go of everything, in a forked child: sockets that it held open would not close with its parent."""
        self._closed = True
        for one in (*(peer.socket for peer in self._peers.values()), *self._wake):
            one.close()

    def _say(self, word: Word) -> None:
        with self._speaking:
            if self._said:
                return
            self._said = not isinstance(word, Begun)
            for peer in tuple(self._peers.values()):
                with contextlib.suppress(OSError):  # it has ended before
                    peer.socket.sendall(encoded(word))

    def _watch(self) -> None:
        """The thread: hear the others until this process closes, or must be ended."""
        unread = dict.fromkeys(self._peers, b"")
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake[0], selectors.EVENT_READ)
            for peer in self._peers.values():
                selector.register(peer.socket, selectors.EVENT_READ, peer)
            said = False
            while not self._closed:
                if self._deadline < math.inf and not said:
                    said = True
                    _print(self._cause)  # at once: before the errors that follow from it
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self._end()
                for key, _ in selector.select(None if left == math.inf else left):
                    if key.data is None:
                        self._wake[0].recv(1)
                    elif not self._hear(key.data, unread):
                        selector.unregister(key.fileobj)
        for one in (*(peer.socket for peer in self._peers.values()), *self._wake):
            one.close()

    def _hear(self, peer: Peer, unread: dict[int, bytes]) -> bool:
        """Read what a process says; tell whether more may come."""
        try:
            found = peer.socket.recv(65536)
        except OSError:  # it ended with something of ours unread
            found = b""
        *lines, unread[peer.rank] = (unread[peer.rank] + found).split(b"\n")
        with self._heard:
            try:
                if len(unread[peer.rank]) > LINE_LIMIT:
                    raise ValueError(f"a line of more than {LINE_LIMIT:,} bytes")
                for line in lines:
                    self._note(peer.rank, decoded(line))
            except ValueError as error:
                self._know(f"rank {peer.rank} failed: what it said of its end is none ({peer.name}): {error}")
                return False
            if not found and peer.rank not in self._left:
                self._know(
                    f"rank {peer.rank} failed: it ended without a word ({peer.name}): it was killed, or left "
                    "by os._exit; where memory was short, the kernel's log tells"
                )
        return bool(found)

    def _note(self, rank: int, word: Word) -> None:
        if isinstance(word, Failed):
            self._know(word.cause)
            return
        if isinstance(word, Begun):
            behind = self._number(rank) < self._begun  # it has not begun what this one has, as far as it has said so
            self._others[rank] = word
            # This one has gone on without that one: it took a step there. Or that one has passed what this one begins.
            if word.number <= self._begun or (behind and self._what != STEP):
                self._compare(rank, word)
            self._heard.notify_all()
            return
        self._left[rank] = word.begun
        self._shortest = min(self._shortest, word.begun)
        if word.begun < self._begun:
            self._know(self._parting(rank))
        self._heard.notify_all()

    def _compare(self, rank: int, word: Begun) -> None:
        """Fail if another process begins something else than this one does, or at another point."""
        if (word.number, word.what) != (self._begun, self._what):
            own = self._named(STEP) if self._what == STEP else self._what
            theirs, mine = (
                (f" as number {word.number:,}", f" as number {self._begun:,}") if word.what == own else ("", "")
            )
            self._fail(
                f"rank {rank} begins {word.what}{theirs} ({self._peers[rank].name}) where rank {self.rank} begins "
                f"{own}{mine}: {_TOGETHER}"
                f"{_NUMBERED if self._programs > 1 else ''}"
            )

    def _fail(self, cause: str) -> None:
        """Note that the processes cannot go on together, and tell the others why."""
        if self._cause is None:
            self._know(cause)
            self._say(Failed(cause))

    def _parting(self, rank: int) -> str:
        return (
            f"rank {rank} has ended, in peace ({self._peers[rank].name}); rank {self.rank}, which has begun "
            f"{self._what} after it, needed it: {_TOGETHER}"
        )

    def _know(self, cause: str) -> None:
        """Note a failure of another process, if it is the first; from now on this one has little time to end."""
        if self._cause is not None:
            return
        self._cause, self._deadline = cause, time.monotonic() + GRACE
        # Where the interpreter's lock is held, or the interpreter hangs at its very end, no thread of Python can act.
        faulthandler.dump_traceback_later(2 * GRACE + 0.5, exit=True, file=2)
        self._heard.notify_all()
        self._rouse()

    def _tell(self) -> None:
        """Note that the training knows of the failure; it is given more time, once."""
        if not self._told:
            self._told, self._deadline = True, self._deadline + GRACE

    def _rouse(self) -> None:
        with contextlib.suppress(OSError):
            self._wake[1].send(b"\0")

    def _end(self) -> None:
        """End this process, whatever it does."""
        _print(f"rank {self.rank} is ended, since it has not ended by itself")
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)  # which may block for ever, on a full pipe
        flushing.start()
        flushing.join(0.5)
        os._exit(1)


def _print(text: object) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _is_peaceful(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0, EXIT_CODE, INTERRUPTED)


def _tell_launcher(error: BaseException) -> None:
    """Write an error where torchrun looks for it, and as it expects it, so that its summary names it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    # It counts whole seconds, and of those that ended in the same one takes the lowest rank for the root.
    trace = {"py_callstack": "".join(traceback.format_exception(error)), "timestamp": str(int(time.time()) - 1)}
    summary = "".join(traceback.format_exception_only(error)).strip()
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": summary, "extraInfo": trace}}), encoding="utf-8")
