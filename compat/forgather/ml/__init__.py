"""Trainer classes over the functions of :mod:`forgather_fn`, with the interface of transformers' own.

Names are loaded when they are first asked for.
"""

import importlib
from typing import Any

_WHERE = {
    "forgather.ml.trainer.base_trainer": ("AbstractBaseTrainer", "BaseTrainer", "ExtensibleTrainer"),
    "forgather.ml.trainer.trainer": ("Trainer",),
    "forgather.ml.trainer.seq2seq": ("Seq2SeqTrainer",),
    "forgather.ml.trainer.arguments": ("Seq2SeqTrainingArguments", "TrainingArguments"),
    "forgather.ml.trainer.callbacks": (
        "DefaultFlowCallback",
        "EarlyStoppingCallback",
        "PrinterCallback",
        "ProgressCallback",
        "TrainerCallback",
    ),
    "forgather.ml.trainer.collators": (
        "DataCollatorWithPadding",
        "DefaultDataCollator",
        "default_data_collator",
    ),
    "forgather.ml.trainer.enums": ("HubStrategy", "IntervalStrategy", "SaveStrategy", "SchedulerType"),
    "forgather.ml.trainer.seeding": ("enable_full_determinism", "set_seed"),
    "forgather.ml.trainer.trainer_types": (
        "EvalLoopOutput",
        "EvalPrediction",
        "ExportableState",
        "PredictionOutput",
        "TrainOutput",
        "TrainerControl",
        "TrainerState",
        "get_last_checkpoint",
        "speed_metrics",
    ),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
