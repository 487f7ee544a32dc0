"""How the processes of a run come to act on one command at one step."""

from typing import Final, Protocol

from forgather_fn.control.command import Command
from forgather_fn.world import World

_COMMANDS: Final[tuple[Command | None, ...]] = (None, *Command)
"""By the number that is sent."""


class Agree(Protocol):
    """Find, between two steps, the command that every process acts on. It is collective."""

    def __call__(self, mine: Command | None, /) -> Command | None:
        """Take what the first process was asked for, and give all processes the same; the others give None."""
        ...


def agreeing(world: World) -> Agree:
    """Make the agreement of a world.

    One process agrees with itself, at once. Of several, each step's command is sent beside the next step and read
    after it, so that nobody waits, and a command acts one step later.
    """
    if world.size == 1:
        return lambda mine: mine
    poll = world.polled()
    return lambda mine: _COMMANDS[poll(_COMMANDS.index(mine))]
