"""Control of running jobs from outside: commands that act between two steps, a server, and its clients."""

from typing import TYPE_CHECKING

from forgather_fn.deferred import deferred_names

if TYPE_CHECKING:
    from forgather_fn.control.command import Command, ControlError
    from forgather_fn.control.inbox import Inbox
    from forgather_fn.control.stage import Aborted, controlled

__all__ = ["Aborted", "Command", "ControlError", "Inbox", "controlled"]

if not TYPE_CHECKING:  # for whom a module with a __getattr__ has any name
    __getattr__, __dir__ = deferred_names(
        __name__,
        {
            "command": "Command ControlError",
            "inbox": "Inbox",
            "stage": "Aborted controlled",
        },
    )
