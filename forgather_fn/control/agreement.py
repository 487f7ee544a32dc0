"""How the processes of a run come to act on one command at one step."""

import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import attrs

from forgather_fn.control.command import Command
from forgather_fn.loop import Clock
from forgather_fn.world import World

SECONDS: Final = 0.02
"""How far apart two polls are at least, about; where steps take longer, there is one a step."""
FARTHEST: Final = 256
"""Steps that two polls are apart at most: the pace may change."""

_COMMANDS: Final[tuple[Command | None, ...]] = (None, *Command)
"""By the number that is sent."""


class Agree(Protocol):
    """Find, between two steps, the command that every process acts on. Every process calls it after every step."""

    def __call__(self, mine: Command | None, /) -> Command | None:
        """Take what the first process was asked for, and give all processes the same, in the order in which it came."""
        ...


def agreeing(world: World, clock: Clock = time.monotonic) -> Agree:
    """Make the agreement of a world.

    One process agrees with itself, at once. Of several, the first one's command is sent beside a step, and read at the
    next poll, so that nobody waits. Polls are about 20 ms apart: the first process says with each how many steps that
    is, since it must be the same step for all.
    """
    return (lambda mine: mine) if world.size == 1 else _Polled(world.polled(), world.main, clock)


@attrs.define(eq=False)
class _Polled:
    """When the next poll is, and what waits for it on the first process."""

    poll: Callable[[int], int]
    main: bool
    clock: Clock
    waiting: deque[Command] = attrs.field(factory=deque)
    apart: int = 1
    left: int = 0
    before: float | None = None

    def __call__(self, mine: Command | None, /) -> Command | None:
        if mine is not None:
            self.waiting.append(mine)
        if self.left:
            self.left -= 1
            return None
        found = self.poll(self._said() if self.main else 0)
        apart, number = divmod(found, len(_COMMANDS))
        self.apart = apart or self.apart  # nothing is known of the first poll
        self.left = self.apart - 1
        return _COMMANDS[number]

    def _said(self) -> int:
        """Put how many steps polls are to be apart, and the command that waits longest, into one number."""
        now, before = self.clock(), self.before
        self.before = now
        pace = (now - before) / self.apart if before is not None else SECONDS
        apart = min(max(int(SECONDS / pace), 1), FARTHEST) if pace > 0 else FARTHEST
        return apart * len(_COMMANDS) + _COMMANDS.index(self.waiting.popleft() if self.waiting else None)
