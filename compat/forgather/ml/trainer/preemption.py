"""What a scheduler's signal asks of a training: save after the step that is running, and end."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def noting_preemption(args: Any) -> Iterator[Callable[[], bool]]:
    """Note SIGTERM for the time of a block, where ``enable_jit_checkpoint`` asks for it.

    A second signal ends the process as it would have done without this. In a thread other than the main one no signal
    can be noted.

    Returns:
        A function that tells whether the signal came.
    """
    if not args.enable_jit_checkpoint or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(number)
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
