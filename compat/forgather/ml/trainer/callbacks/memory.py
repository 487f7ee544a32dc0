"""The most memory that was in use."""

import resource
import sys
from collections.abc import MutableMapping
from typing import Any

import torch

from forgather.ml.trainer.callbacks.base import TrainerCallback
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState


class PeakMemory(TrainerCallback):
    """Add ``peak_mem_allocated`` to what is logged: bytes, the most that were in use since the log before.

    On an accelerator that is what torch had allocated. On a CPU it is what the process had in memory, since it began:
    a number that cannot be set back. Put it before callbacks that write logs.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin to measure."""
        _begin(args.device)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: MutableMapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the number, and begin anew."""
        if logs is not None:
            logs["peak_mem_allocated"] = peak(args.device)
            _begin(args.device)


def peak(device: torch.device) -> int:
    """Give the most bytes that were in use: on an accelerator, or of this process."""
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated(device))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _begin(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
