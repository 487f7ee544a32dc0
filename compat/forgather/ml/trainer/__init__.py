"""The trainers and what they are told. Names are loaded when they are first asked for."""

from typing import Final

from forgather.ml.trainer import callbacks as _callbacks
from forgather.ml.when_used import when_used

_WHERE: Final = {
    "accel_trainer": ("AccelTrainer",),
    "arguments": (
        "Seq2SeqTrainingArguments",
        "TrainingArguments",
    ),
    "abstract": ("AbstractBaseTrainer", "ExtensibleTrainer"),
    "base_trainer": ("BaseTrainer",),
    "callbacks": _callbacks.__all__,
    "collators": (
        "DataCollatorWithPadding",
        "DefaultDataCollator",
        "default_data_collator",
    ),
    "enums": (
        "EvaluationStrategy",
        "HubStrategy",
        "IntervalStrategy",
        "OptimizerNames",
        "ParallelMode",
        "SaveStrategy",
        "SchedulerType",
    ),
    "parallel_arguments": ("AccelTrainingArguments", "PipelineTrainingArguments"),
    "pipeline_trainer": ("PipelineTrainer",),
    "scheduling": ("get_scheduler",),
    "seeding": (
        "enable_full_determinism",
        "set_seed",
    ),
    "seq2seq": ("Seq2SeqTrainer",),
    "trainer": ("Trainer",),
    "trainer_types": (
        "BestRun",
        "EvalLoopOutput",
        "EvalPrediction",
        "PredictionOutput",
        "TrainOutput",
        "get_last_checkpoint",
        "speed_metrics",
    ),
}
"""In which module of this package each name is."""

_HOME: Final = {name: f"{__name__}.{module}" for module, names in _WHERE.items() for name in names}

__all__ = sorted(_HOME)
__getattr__ = when_used(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
