"""What the layer tells through ``logging``, made visible at the level that arguments ask for."""

import logging
import sys
from typing import Final

LOGGERS: Final = ("forgather", "forgather_fn")
"""Loggers that what the packages tell goes through."""


class Stderr(logging.Handler):
    """Writes to standard error as long as the program has set up no logging of its own, which has them all the same."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, with the name of its logger."""
        if not logging.getLogger().handlers:
            sys.stderr.write(f"[{record.name.partition('.')[0]}] {self.format(record)}\n")


_SHOWN: Final = Stderr()


def show_messages(level: int) -> None:
    """Show messages of a level and above: Python alone shows none below a warning.

    Args:
        level: As in ``logging``.
    """
    for name in LOGGERS:
        found = logging.getLogger(name)
        found.setLevel(level)
        found.addHandler(_SHOWN)  # which is there once, however often it is added
