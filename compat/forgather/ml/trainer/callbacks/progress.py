"""Bars of progress, and plain lines where bars are not wanted."""

import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

from forgather.ml.trainer.callbacks.base import Logs, TrainerCallback
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState


def shown(logs: Mapping[str, Any], longest: int = 100) -> dict[str, Any]:
    """Bring logs to what is printed: floats to four digits, long texts to a note."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, str) and len(value) > longest:
            return (
                f"[String too long to display, length: {len(value)} > {longest}. "
                "Consider increasing `max_str_len` if needed.]"
            )
        return value

    return {name: short(value) for name, value in logs.items()}


class ProgressCallback(TrainerCallback):
    """Draw a bar for training and one for each evaluation, and write logs above them.

    Args:
        max_str_len: Above which length a logged text is left out.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self.max_str_len = max_str_len
        self.current_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Open the bar, at the step at which a resumed run begins."""
        if state.is_world_process_zero:
            from tqdm.auto import tqdm

            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
        self.current_step = state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Move the evaluation's bar, where it is known how long it is."""
        if not state.is_world_process_zero:
            return
        if self.prediction_bar is None:
            from tqdm.auto import tqdm

            try:
                total = len(eval_dataloader)
            except (TypeError, AttributeError):
                return
            self.prediction_bar = tqdm(total=total, leave=self.training_bar is None, dynamic_ncols=True)
        self.prediction_bar.update(1)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the evaluation's bar."""
        if self.prediction_bar is not None:
            self.prediction_bar.close()
        self.prediction_bar = None

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Close the prediction's bar."""
        self.on_evaluate(args, state, control)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Logs = None, **kwargs: Any) -> None:
        """Write logs above the bar."""
        if self.training_bar is not None:
            values = {name: value for name, value in (logs or {}).items() if name != "total_flos"}
            self.training_bar.write(str(shown(values, self.max_str_len)))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the bar."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class PrinterCallback(TrainerCallback):
    """Print logs, a line each."""

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: MutableMapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print logs without ``total_flos``, which is taken out of them, as transformers does."""
        if logs is None:
            return
        logs.pop("total_flos", None)
        if state.is_local_process_zero:
            sys.stdout.write(f"{shown(logs, sys.maxsize)}\n")
