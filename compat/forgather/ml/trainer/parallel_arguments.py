"""The arguments of the trainers for several processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from forgather.ml.trainer.accelerator_config import AcceleratorConfig
from forgather.ml.trainer.arguments import TrainingArguments
from forgather.ml.trainer.fields.describing import does
from forgather.ml.trainer.refusals import REFUSED, Refusal

SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved1f1b",
    "loopedbfs",
    "interleavedzerobubble",
    "zbv",
    "zbvzerobubble",
    "dualpipev",
)
"""The names of pipeline schedules, without regard to case."""


@dataclass(repr=False)
class AccelTrainingArguments(TrainingArguments):
    """The arguments of a trainer over Accelerate: those of :class:`TrainingArguments`, and Accelerate's own."""

    accelerator_args: dict[str, Any] | str | None = field(
        default=None, metadata=does("Arguments of accelerate.Accelerator, as a dict or JSON.")
    )
    reduction: str = field(
        default="sum",
        metadata=does(
            "How gradients are added up over processes: sum, or tree, for the same bits on 1, 2 and 4.",
            choices=["sum", "tree"],
        ),
    )
    allow_batch_change: bool = field(
        default=False, metadata=does("Go on from a checkpoint with steps of another size than it was trained with.")
    )

    refused: ClassVar[Mapping[str, Refusal]] = {
        **REFUSED,
        "fsdp": Refusal(
            "each process holds the whole model, over which users hold an optimizer; for one that does not fit, use "
            "ff.accelerated(plan, sharded=True)",
            lambda value: bool(value),
        ),
        "parallelism_config": Refusal("each process holds the whole model; PipelineTrainer cuts one"),
        "deepspeed": Refusal("DeepSpeed keeps parameters, gradients and the optimizer itself"),
        "ddp_bucket_cap_mb": Refusal(
            "there are no buckets: gradients are one buffer, sent in pieces where it is large"
        ),
        "ddp_broadcast_buffers": Refusal(
            "buffers become those of the first process after each step", lambda value: value is False
        ),
    }
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "accelerator_args"]

    def __post_init__(self) -> None:
        """Derive and check; what is said to Accelerate holds for the trainer too.

        Raises:
            ValueError: Arguments contradict each other, or one of them is not honoured.
        """
        super().__post_init__()
        if self.reduction not in ("sum", "tree"):
            raise ValueError(f"reduction={self.reduction!r} is not one of ['sum', 'tree']")
        if not isinstance(self.accelerator_args, dict | None):
            raise ValueError(f"accelerator_args={self.accelerator_args!r}: expected a dict, or JSON")
        told = self.accelerator_args or {}
        if told.get("cpu"):
            self.use_cpu = True
        asked = str(told.get("mixed_precision") or "no")
        if asked not in ("no", self.mixed_precision) and (self.bf16 or self.fp16):
            raise ValueError(
                f"accelerator_args asks for mixed_precision={asked!r}, and the arguments for {self.mixed_precision!r}: "
                "leave one of them out"
            )
        if asked in ("bf16", "fp16"):
            setattr(self, asked, True)
            self.mixed_precision = asked

    def for_accelerator(self) -> dict[str, Any]:
        """Give the arguments of ``accelerate.Accelerator`` that these make."""
        assert not isinstance(self.accelerator_args, str)
        made: dict[str, Any] = {"cpu": self.device.type == "cpu", **(self.accelerator_args or {})}
        if self.ddp_backend is not None or self.ddp_timeout != 1800:
            from accelerate import InitProcessGroupKwargs

            opened = InitProcessGroupKwargs(backend=self.ddp_backend, timeout=self.ddp_timeout_delta)
            made["kwargs_handlers"] = [opened, *made.get("kwargs_handlers", [])]
        return made

    def check_processes(self, number: int) -> None:
        """Refuse what several processes cannot do.

        Args:
            number: How many there are.

        Raises:
            ValueError: There are several, and one of these arguments is for one.
        """
        if number == 1:
            return
        if self.auto_find_batch_size:
            raise ValueError(
                f"auto_find_batch_size=True on {number} processes: where memory runs out on one, the others wait for "
                "it. Find the batch size on one process, and give per_device_train_batch_size"
            )
        assert isinstance(self.accelerator_config, AcceleratorConfig)
        if self.accelerator_config.split_batches:
            raise ValueError(
                "accelerator_config: split_batches=True makes per_device_train_batch_size the batch of all processes; "
                f"give per_device_train_batch_size={self.per_device_train_batch_size // number} instead"
            )


@dataclass(repr=False)
class PipelineTrainingArguments(TrainingArguments):
    """The arguments of a trainer whose model is cut into stages, one or several to a process."""

    split_spec: dict[str, str] | str | None = field(
        default=None, metadata=does("Where the model is cut: {'layer.4': 'end'}, or 'beginning', as a dict or JSON.")
    )
    n_microbatches: int = field(
        default=4, metadata=does("Parts of a batch that go through the stages one after the other.")
    )
    stages_per_rank: int | None = field(
        default=None, metadata=does("Stages of one process; by default, as many as there are for each.")
    )
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
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}={number!r}: expected at least 1")
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
        stages = len(self.split_spec) + 1
        if self.stages_per_rank is None and stages % self.world_size:
            raise ValueError(
                f"split_spec makes {stages} stages of {len(self.split_spec)} cuts, which cannot be spread evenly over "
                f"{self.world_size} processes"
            )
        if self.stages_per_rank is not None and stages != self.stages_per_rank * self.world_size:
            raise ValueError(
                f"split_spec makes {stages} stages of {len(self.split_spec)} cuts, but stages_per_rank="
                f"{self.stages_per_rank} on {self.world_size} processes are {self.stages_per_rank * self.world_size}"
            )
