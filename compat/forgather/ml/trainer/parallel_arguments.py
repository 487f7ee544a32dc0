"""The arguments of the trainers for several processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from forgather.ml.trainer.arguments import TrainingArguments
from forgather.ml.trainer.fields.describing import does
from forgather.ml.trainer.refusals import REFUSED, Refusal

SCHEDULES = ("gpipe", "1f1b", "interleaved1f1b", "zbv", "interleavedzerobubble")
"""The names of pipeline schedules, without regard to case."""


@dataclass(repr=False)
class AccelTrainingArguments(TrainingArguments):
    """The arguments of a trainer over Accelerate: those of :class:`TrainingArguments`, and Accelerate's own."""

    accelerator_args: dict[str, Any] | str | None = field(
        default=None, metadata=does("Arguments of accelerate.Accelerator, as a dict or JSON.")
    )

    refused: ClassVar[Mapping[str, Refusal]] = {
        name: refusal for name, refusal in REFUSED.items() if name not in ("fsdp", "parallelism_config")
    }
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "accelerator_args"]


@dataclass(repr=False)
class PipelineTrainingArguments(TrainingArguments):
    """The arguments of a trainer whose model is cut into stages, one or several to a process."""

    split_spec: dict[str, str] | str | None = field(
        default=None, metadata=does("Where the model is cut: {'layer.4': 'end'}, or 'beginning', as a dict or JSON.")
    )
    n_microbatches: int = field(
        default=4, metadata=does("Parts of a batch that go through the stages one after the other.")
    )
    stages_per_rank: int = field(default=1, metadata=does("Stages of one process."))
    pipeline_schedule: str = field(
        default="gpipe", metadata=does(f"The order of the parts: one of {', '.join(SCHEDULES)}.")
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "split_spec"]

    def __post_init__(self) -> None:
        """Check what is said of stages.

        Raises:
            ValueError: There are not as many cuts as stages need, parts that a batch cannot be cut into, or an unknown
                schedule.
        """
        super().__post_init__()
        for name in ("n_microbatches", "stages_per_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected at least 1")
        if self.per_device_train_batch_size % self.n_microbatches:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} cannot be cut into "
                f"n_microbatches={self.n_microbatches} equal parts"
            )
        if self.pipeline_schedule.lower() not in SCHEDULES:
            raise ValueError(f"pipeline_schedule={self.pipeline_schedule!r} is not one of {', '.join(SCHEDULES)}")
        self._check_cuts()

    def _check_cuts(self) -> None:
        if self.split_spec is None:
            return
        if not isinstance(self.split_spec, dict):
            raise ValueError(f"split_spec={self.split_spec!r}: expected a dict such as {{'layer.4': 'end'}}, or JSON")
        if wrong := {name: where for name, where in self.split_spec.items() if where not in ("beginning", "end")}:
            raise ValueError(f"split_spec has {wrong}: each module is cut at its 'beginning' or 'end'")
        stages = self.stages_per_rank * self.world_size
        if len(self.split_spec) + 1 != stages:
            raise ValueError(
                f"split_spec makes {len(self.split_spec) + 1} stages of {len(self.split_spec)} cuts, but "
                f"stages_per_rank={self.stages_per_rank} on {self.world_size} processes are {stages}"
            )
