"""The inbox of a run: what it was asked for and has not done yet, and what it tells of itself.

Two sides meet here. Threads that serve clients post commands and read; the loop takes commands, answers them, and says
where it is. Neither waits for the other.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, Final

import attrs

from forgather_fn.control.command import Command, ControlError
from forgather_fn.control.progress import Numbers, Progress

Reply = Mapping[str, Any]
"""What was done, in plain data."""

LOOK_AGAIN: Final = 0.5
"""Seconds for which the numbers of one look are good."""


@attrs.frozen(eq=False)
class Request:
    """A command, and the promise of an answer.

    Attributes:
        command: What was asked for.
        answer: What came of it: a reply, or a :class:`~forgather_fn.control.command.ControlError`.
    """

    command: Command
    answer: "Future[Reply]" = attrs.field(factory=Future)

    def fail(self, reason: str) -> None:
        """Answer that it was not done, and why."""
        with contextlib.suppress(InvalidStateError):  # it was answered already, perhaps by another thread just now
            self.answer.set_exception(ControlError(f"{self.command}: {reason}"))

    def done(self, **found: Any) -> None:
        """Answer that it was done."""
        with contextlib.suppress(InvalidStateError):
            self.answer.set_result({"command": str(self.command), **found})


@attrs.define(eq=False)
class Inbox:
    """What a run was asked for, and what it tells of itself; :func:`~forgather_fn.control.serving.serve` makes one.

    Attributes:
        run: The run directory, where there is one.
        job: The id under which it is served; None where it is not.
        clock: Gives seconds, for rates.
        progress: How far the run is; None before its first step.
        numbers: What the last look at the metrics found; None before.
        last_error: What went wrong last and did not end the run.
        world_size: How many processes the run has.
        ended: Why nothing can be asked for any more; None while it can.
        attended: Whether something has looked at what was asked for, or is about to; see :attr:`unattended`.
    """

    run: Path | None = None
    job: str | None = None
    clock: Callable[[], float] = time.monotonic
    progress: Progress | None = None
    numbers: Numbers | None = None
    last_error: str | None = None
    world_size: int = 1
    ended: str | None = None
    attended: bool = False
    _waiting: deque[Request] = attrs.field(factory=deque)
    _taken: list[Request] = attrs.field(factory=list)
    _looks: deque["Future[Numbers]"] = attrs.field(factory=deque)

    @property
    def unattended(self) -> str | None:
        """Say that what was asked for waits, and nothing in the run has ever looked at it; None otherwise."""
        if self.attended or not self._waiting:
            return None
        return (
            "nothing in this run has looked yet at what it is asked for: a stream of steps does that has "
            "ff.controlled(inbox) among its stages"
        )

    def post(self, command: Command | str) -> "Future[Reply]":
        """Ask for something; any thread may.

        Returns:
            What will have the reply when it was done, or a ControlError.

        Raises:
            ControlError: There is no such command, or the run has ended.
        """
        try:
            request = Request(Command(command))
        except ValueError:
            known = ", ".join(Command)
            raise ControlError(f"{command!r} is not a command; there are {known}") from None
        self._waiting.append(request)
        if self.ended is not None:  # seen after the append, so that whoever ends the run sees one or the other
            self.fail_all(self.ended)
        return request.answer

    def take(self) -> Request | None:
        """Give the oldest command that nobody has taken, or None. The loop takes, and answers what it has taken."""
        self.attended = True
        if not self._waiting:
            return None
        try:
            request = self._waiting.popleft()
        except IndexError:  # another thread was faster: the run has just ended
            return None
        self._taken = [one for one in self._taken if not one.answer.done()] + [request]
        return request

    def waiting(self) -> tuple[Command, ...]:
        """Name what was asked for and not answered."""
        taken = [one for one in self._taken if not one.answer.done()]
        return tuple(one.command for one in (*taken, *self._waiting))

    def asked_to_abort(self) -> bool:
        """Tell whether an abort is waiting; this costs nothing where nothing is."""
        return bool(self._waiting) and any(one.command is Command.ABORT for one in tuple(self._waiting))

    def look(self) -> "Future[Numbers]":
        """Ask for the metrics of the next step; any thread may. At most two looks a second reach the device.

        Whoever does not wait for them any more cancels the future, and it is forgotten.
        """
        wanted: Future[Numbers] = Future()
        for one in [one for one in tuple(self._looks) if one.cancelled()]:
            with contextlib.suppress(ValueError):  # the loop has just shown it, or another thread forgotten it
                self._looks.remove(one)
        fresh = self.numbers
        if fresh is not None and self.clock() - fresh.time < LOOK_AGAIN:
            wanted.set_result(fresh)
        else:
            self._looks.append(wanted)
        return wanted

    def looked_for(self) -> bool:
        """Tell whether someone waits for the metrics of a step."""
        return bool(self._looks)

    def show(self, numbers: Numbers) -> None:
        """Give the metrics to whoever waits for them."""
        self.numbers = numbers
        while self._looks:
            with contextlib.suppress(InvalidStateError, IndexError):  # who asked has given up, perhaps just now
                self._looks.popleft().set_result(numbers)

    def fail_all(self, reason: str) -> None:
        """Answer everything that is waiting that it was not done."""
        for request in self._taken:
            request.fail(reason)
        while (waiting := self.take()) is not None:
            waiting.fail(reason)

    def end(self, reason: str) -> None:
        """Refuse what comes from now on, and what is waiting."""
        self.ended = reason
        self.fail_all(reason)
