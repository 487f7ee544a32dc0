"""Torch's profiler."""

from pathlib import Path
from typing import Any

from forgather.ml.trainer.callbacks.base import TrainerCallback
from forgather.ml.trainer.callbacks.place import logging_dir
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState


class ProfilerCallback(TrainerCallback):
    """Profile some updates, and write a trace that chrome://tracing and Perfetto read.

    Args:
        directory: Where ``trace-<step>.json`` goes; None for ``logging_dir`` of the arguments.
        wait: Updates that are left out first.
        warmup: Updates that are profiled and not written.
        active: Updates that are written.
        repeat: How often that is done.
        options: Of ``torch.profiler.profile``, such as ``profile_memory=True``.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        **options: Any,
    ) -> None:
        self.directory = directory
        self.times = {"wait": wait, "warmup": warmup, "active": active, "repeat": repeat}
        self.options = options
        self.profiler: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin to count."""
        if not state.is_world_process_zero:
            return
        from torch import profiler

        directory = logging_dir(args) if self.directory is None else Path(self.directory)
        directory.mkdir(parents=True, exist_ok=True)

        def write(made: Any) -> None:
            made.export_chrome_trace(str(directory / f"trace-{state.global_step}.json"))

        self.profiler = profiler.profile(schedule=profiler.schedule(**self.times), on_trace_ready=write, **self.options)
        self.profiler.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an update."""
        if self.profiler is not None:
            self.profiler.step()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop; a trace that is not complete is written as it is."""
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None
