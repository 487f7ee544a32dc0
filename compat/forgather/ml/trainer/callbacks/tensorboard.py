"""TensorBoard."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forgather.ml.trainer.callbacks.base import Logs, TrainerCallback
from forgather.ml.trainer.callbacks.place import logging_dir
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState

logger = logging.getLogger(__name__)

Scalar = tuple[str, str] | tuple[str, str, Callable[[Any], float]]


class TBLogger(TrainerCallback):
    """Write logs to TensorBoard, under the tags that transformers uses: ``train/loss``, ``eval/accuracy``.

    Args:
        summary_writer: A ``SummaryWriter``, which stays open. Without one, a writer is made when a run begins, in
            ``logging_dir`` of the arguments, and closed with it; what an attempt wrote beyond the step that a run is
            resumed at is hidden.
        scalars: What is written, as ``(key, tag)`` or ``(key, tag, function of the value)``; None for all of the logs.
        meta: Further texts, written when a run begins.
    """

    def __init__(self, summary_writer: Any = None, scalars: Sequence[Scalar] | None = None, **meta: Any) -> None:
        self.summary_writer = summary_writer
        self.scalars = scalars
        self.meta = meta
        self._owned = summary_writer is None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Open a writer, and write what the run is."""
        if not state.is_world_process_zero:
            return
        if self.summary_writer is None:
            self._open(args, state)
        self.summary_writer.add_text("args", args.to_json_string())
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_json_string"):
            self.summary_writer.add_text("model_config", config.to_json_string())
        for name, value in self.meta.items():
            self.summary_writer.add_text(name, str(value))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Logs = None, **kwargs: Any) -> None:
        """Write numbers as scalars and texts as texts; what is neither is named in a warning."""
        if not state.is_world_process_zero:
            return
        if self.summary_writer is None:  # an evaluation without a training
            self._open(args, state)
        for tag, value in self._tagged(logs or {}):
            if isinstance(value, int | float):
                self.summary_writer.add_scalar(tag, value, state.global_step)
            elif isinstance(value, str):
                self.summary_writer.add_text(tag, value, state.global_step)
            else:
                logger.warning("%s: %r is not written: TBLogger writes numbers and texts", tag, value)
        self.summary_writer.flush()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the writer, if it was opened here."""
        if self._owned and self.summary_writer is not None:
            self.summary_writer.close()
            self.summary_writer = None

    def _open(self, args: Any, state: TrainerState) -> None:
        from torch.utils.tensorboard import SummaryWriter

        resumed = state.global_step + 1 if state.global_step else None
        self.summary_writer = SummaryWriter(str(logging_dir(args)), purge_step=resumed)

    def _tagged(self, logs: Mapping[str, Any]) -> list[tuple[str, Any]]:
        if self.scalars is None:
            return [(tag(name), value) for name, value in logs.items()]
        found = []
        for key, label, *function in self.scalars:
            if key in logs:
                found.append((label, function[0](logs[key]) if function else logs[key]))
        return found


def tag(name: str) -> str:
    """Bring the name of a logged value to a tag.

    Example:
        >>> tag("loss"), tag("eval_loss"), tag("test_accuracy")
        ('train/loss', 'eval/loss', 'test/accuracy')
    """
    for prefix in ("eval", "test"):
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name.removeprefix(f'{prefix}_')}"
    return f"train/{name}"
