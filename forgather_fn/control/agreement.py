"""How the processes of a run come to act on one command at one step."""

from typing import Any, Final, Protocol

import attrs

from forgather_fn.control.command import Command
from forgather_fn.world import World

_COMMANDS: Final[tuple[Command | None, ...]] = (None, *Command)
"""By the number that is sent."""


class Agree(Protocol):
    """Find, between two steps, the command that every process acts on. It is collective."""

    def __call__(self, mine: Command | None, /) -> Command | None:
        """Take what the first process was asked for, and give all processes the same; others' own does not count."""
        ...


def agreeing(world: World) -> Agree:
    """Make the agreement of a world.

    One process agrees with itself, at once. Of several, the first one's command is sent to all after each step and
    read after the next one: the send goes on beside that step, so that nobody waits for it, and a command acts one
    step later.
    """
    return (lambda mine: mine) if world.size == 1 else _Sent(world.beside())


@attrs.define(eq=False)
class _Sent:
    """The number of a command on its way."""

    world: World
    under_way: tuple[Any, Any] | None = None

    def __call__(self, mine: Command | None, /) -> Command | None:
        import torch
        from torch import distributed

        before = self.under_way
        number = torch.tensor([_COMMANDS.index(mine)])
        with self.world.explained():
            sent = distributed.broadcast(number, group_src=0, group=self.world.control, async_op=True)
            self.under_way = number, sent
            if before is None:
                return None
            before[1].wait()
        return _COMMANDS[int(before[0])]
