"""TensorBoard."""

from typing import Any

from forgather.ml.trainer.callbacks.base import TrainerCallback


class TBLogger(TrainerCallback):
    """Write logs to TensorBoard."""

    def __init__(self, summary_writer: Any = None) -> None:
        self.summary_writer = summary_writer
