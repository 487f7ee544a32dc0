"""What a run can be asked for."""

import enum
import re
from typing import Final


class Command(enum.StrEnum):
    """What a run can be asked for from outside. No command carries an argument.

    The members are the commands' names: ``Command("save-stop") is Command.SAVE_STOP``.
    """

    SAVE = "save"
    """Save a checkpoint, and go on."""
    STOP = "stop"
    """End after this step; what the run saves at its end is saved."""
    SAVE_STOP = "save-stop"
    """Save a checkpoint, and end; where it cannot be saved, go on."""
    ABORT = "abort"
    """End and save nothing; older checkpoints stay."""
    EVALUATE = "evaluate"
    """Evaluate as the run does on its schedule, and go on."""


class ControlError(ValueError):
    """What was asked of a run cannot be done, or was not."""


JOB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Every id of a job matches it as a whole, wherever it comes from: so that it is a name in a directory, and no path."""


def checked_id(job: str) -> str:
    """Give an id back, if it is one.

    Raises:
        ControlError: It is not.

    Example:
        >>> checked_id("demo-2")
        'demo-2'
        >>> checked_id("../demo")
        Traceback (most recent call last):
        forgather_fn.control.command.ControlError: '../demo' is no id of a job: expected 1 to 64 letters, digits, ...
    """
    if not JOB_ID.fullmatch(job):
        raise ControlError(
            f"{job!r} is no id of a job: expected 1 to 64 letters, digits, dots, dashes and underscores, the first a "
            "letter or a digit"
        )
    return job
