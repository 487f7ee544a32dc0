"""Control of running jobs from outside: commands that act between two steps, a server, and its clients."""

from forgather_fn.control.command import Command as Command
from forgather_fn.control.command import ControlError as ControlError
from forgather_fn.control.inbox import Inbox as Inbox
from forgather_fn.control.stage import Aborted as Aborted
from forgather_fn.control.stage import controlled as controlled
