"""Which process these arguments are read in, where it computes, and what it may do."""

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Final

import torch

from forgather.ml.trainer.enums import ParallelMode
from forgather_fn.distributed.launched import number_in

_LEVELS: Final = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class Place:
    """Properties that follow from the environment of a process and some fields."""

    use_cpu: bool
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    ddp_backend: str | None
    ddp_timeout: int
    log_on_each_node: bool
    save_on_each_node: bool
    log_level: str
    log_level_replica: str

    @property
    def device(self) -> torch.device:
        """The device of this process: the CPU if it was asked for or there is no other."""
        named = os.environ.get("ACCELERATE_TORCH_DEVICE")
        if self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return torch.device("cpu")
        if named or not torch.accelerator.is_available():
            return torch.device(named or "cpu")
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return torch.device("mps") if kind.type == "mps" else torch.device(kind.type, self.local_process_index)

    @property
    def n_gpu(self) -> int:
        """How many accelerators this process uses: one, or none; never several, as docs/migration.md says."""
        return int(self.device.type != "cpu")

    @property
    def world_size(self) -> int:
        """How many processes a launcher started."""
        return number_in(os.environ, "WORLD_SIZE", 1, least=1)

    @property
    def process_index(self) -> int:
        """Which of all processes this is."""
        return number_in(os.environ, "RANK", 0)

    @property
    def local_process_index(self) -> int:
        """Which of this machine's processes this is."""
        return number_in(os.environ, "LOCAL_RANK", 0)

    @property
    def parallel_mode(self) -> ParallelMode:
        """Whether there are several processes."""
        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    @property
    def train_batch_size(self) -> int:
        """Samples of one forward pass of this process in training."""
        return self.per_device_train_batch_size * max(1, self.n_gpu)

    @property
    def eval_batch_size(self) -> int:
        """Samples of one forward pass of this process in evaluation."""
        return self.per_device_eval_batch_size * max(1, self.n_gpu)

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """``ddp_timeout`` as torch.distributed takes it."""
        return timedelta(seconds=self.ddp_timeout)

    @property
    def should_log(self) -> bool:
        """Whether this process logs."""
        return (self.local_process_index if self.log_on_each_node else self.process_index) == 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes to disk."""
        return (self.local_process_index if self.save_on_each_node else self.process_index) == 0

    @property
    def place_model_on_device(self) -> bool | None:
        """Whether the trainer moves the model; None leaves it to the trainer. Meant to be overridden."""
        return None

    def get_process_log_level(self) -> int:
        """Give the level of this process's loggers, as a number of :mod:`logging`."""
        word = self.log_level if self.should_log else self.log_level_replica
        if word == "passive":
            return logging.getLogger("transformers").getEffectiveLevel()
        return _LEVELS[word]

    @contextlib.contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Let the first process do something, such as fill a cache, while the others wait.

        The process group is opened, where it is not yet.

        Args:
            local: Whether that is the first of each machine, or the first of all.
            desc: What is done; for people who read the code.
        """
        if self.world_size == 1:
            yield
            return
        from torch import distributed

        if not distributed.is_initialized():
            from accelerate import PartialState  # which a trainer's accelerator goes on with

            PartialState(cpu=self.device.type == "cpu", backend=self.ddp_backend, timeout=self.ddp_timeout_delta)
        first = (self.local_process_index if local else self.process_index) == 0
        if not first:
            distributed.barrier()
        try:
            yield
        finally:
            if first:
                distributed.barrier()
