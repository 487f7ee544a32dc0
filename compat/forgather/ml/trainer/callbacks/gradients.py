"""The sizes of gradients and parameters, one by one."""

import re
from typing import Any

import torch

from forgather.ml.trainer.callbacks.base import TrainerCallback
from forgather.ml.trainer.callbacks.place import logging_dir
from forgather.ml.trainer.trainer_types import TrainerControl, TrainerState


class GradLogger(TrainerCallback):
    """Write the root mean square of each parameter and of its clipped gradient to TensorBoard.

    Args:
        summary_writer: A ``SummaryWriter``, which stays open; None for one in ``logging_dir`` of the arguments.
        neg_re: Parameters whose names match are left out.
        pos_re: Only parameters whose names match are written; None for all.
        log_steps: Updates between two writings; None for ``logging_steps``.
    """

    def __init__(
        self,
        summary_writer: Any = None,
        neg_re: str | None = None,
        pos_re: str | None = None,
        log_steps: int | None = None,
    ) -> None:
        self.summary_writer = summary_writer
        self.neg_re = None if neg_re is None else re.compile(neg_re)
        self.pos_re = None if pos_re is None else re.compile(pos_re)
        self.log_steps = log_steps
        self._owned = summary_writer is None

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Write, when it is time: the step that is about to be made counts."""
        step = state.global_step + 1
        if not state.is_world_process_zero or step % int(self.log_steps or state.logging_steps):
            return
        if self.summary_writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.summary_writer = SummaryWriter(str(logging_dir(args)))
        for name, parameter in model.named_parameters():
            if self._wanted(name) and parameter.grad is not None:
                self.summary_writer.add_scalar(f"weight_rms/{name}", rms(parameter), step)
                self.summary_writer.add_scalar(f"grad_rms/{name}", rms(parameter.grad), step)
        self.summary_writer.flush()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Close the writer, if it was opened here."""
        if self._owned and self.summary_writer is not None:
            self.summary_writer.close()
            self.summary_writer = None

    def _wanted(self, name: str) -> bool:
        left_out = self.neg_re is not None and self.neg_re.search(name)
        return not left_out and (self.pos_re is None or self.pos_re.search(name) is not None)


def rms(tensor: torch.Tensor) -> float:
    """Take the root of the mean square; 0 for a tensor without elements."""
    return float(tensor.detach().float().square().mean().sqrt()) if tensor.numel() else 0.0
