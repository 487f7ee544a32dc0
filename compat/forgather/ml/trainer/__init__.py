"""The trainers and what they are told. Names are loaded when they are first asked for."""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from forgather.ml.trainer.abstract import AbstractBaseTrainer as AbstractBaseTrainer
    from forgather.ml.trainer.abstract import ExtensibleTrainer as ExtensibleTrainer
    from forgather.ml.trainer.accel_trainer import AccelTrainer as AccelTrainer
    from forgather.ml.trainer.arguments import Seq2SeqTrainingArguments as Seq2SeqTrainingArguments
    from forgather.ml.trainer.arguments import TrainingArguments as TrainingArguments
    from forgather.ml.trainer.base_trainer import BaseTrainer as BaseTrainer
    from forgather.ml.trainer.callbacks import CallbackHandler as CallbackHandler
    from forgather.ml.trainer.callbacks import DefaultFlowCallback as DefaultFlowCallback
    from forgather.ml.trainer.callbacks import DivergenceDetector as DivergenceDetector
    from forgather.ml.trainer.callbacks import EarlyStoppingCallback as EarlyStoppingCallback
    from forgather.ml.trainer.callbacks import GradLogger as GradLogger
    from forgather.ml.trainer.callbacks import InfoCallback as InfoCallback
    from forgather.ml.trainer.callbacks import JsonLogger as JsonLogger
    from forgather.ml.trainer.callbacks import PeakMemory as PeakMemory
    from forgather.ml.trainer.callbacks import PrinterCallback as PrinterCallback
    from forgather.ml.trainer.callbacks import ProfilerCallback as ProfilerCallback
    from forgather.ml.trainer.callbacks import ProgressCallback as ProgressCallback
    from forgather.ml.trainer.callbacks import TBLogger as TBLogger
    from forgather.ml.trainer.callbacks import TextgenCallback as TextgenCallback
    from forgather.ml.trainer.callbacks import TrainerCallback as TrainerCallback
    from forgather.ml.trainer.callbacks import TrainerControlCallback as TrainerControlCallback
    from forgather.ml.trainer.collators import DataCollatorWithPadding as DataCollatorWithPadding
    from forgather.ml.trainer.collators import DefaultDataCollator as DefaultDataCollator
    from forgather.ml.trainer.collators import default_data_collator as default_data_collator
    from forgather.ml.trainer.enums import EvaluationStrategy as EvaluationStrategy
    from forgather.ml.trainer.enums import HubStrategy as HubStrategy
    from forgather.ml.trainer.enums import IntervalStrategy as IntervalStrategy
    from forgather.ml.trainer.enums import OptimizerNames as OptimizerNames
    from forgather.ml.trainer.enums import ParallelMode as ParallelMode
    from forgather.ml.trainer.enums import SaveStrategy as SaveStrategy
    from forgather.ml.trainer.enums import SchedulerType as SchedulerType
    from forgather.ml.trainer.parallel_arguments import AccelTrainingArguments as AccelTrainingArguments
    from forgather.ml.trainer.parallel_arguments import PipelineTrainingArguments as PipelineTrainingArguments
    from forgather.ml.trainer.pipeline_trainer import PipelineTrainer as PipelineTrainer
    from forgather.ml.trainer.scheduling import get_scheduler as get_scheduler
    from forgather.ml.trainer.seeding import enable_full_determinism as enable_full_determinism
    from forgather.ml.trainer.seeding import set_seed as set_seed
    from forgather.ml.trainer.seq2seq import Seq2SeqTrainer as Seq2SeqTrainer
    from forgather.ml.trainer.trainer import Trainer as Trainer
    from forgather.ml.trainer.trainer_types import BestRun as BestRun
    from forgather.ml.trainer.trainer_types import EvalLoopOutput as EvalLoopOutput
    from forgather.ml.trainer.trainer_types import EvalPrediction as EvalPrediction
    from forgather.ml.trainer.trainer_types import ExportableState as ExportableState
    from forgather.ml.trainer.trainer_types import PredictionOutput as PredictionOutput
    from forgather.ml.trainer.trainer_types import TrainerControl as TrainerControl
    from forgather.ml.trainer.trainer_types import TrainerState as TrainerState
    from forgather.ml.trainer.trainer_types import TrainOutput as TrainOutput
    from forgather.ml.trainer.trainer_types import get_last_checkpoint as get_last_checkpoint
    from forgather.ml.trainer.trainer_types import speed_metrics as speed_metrics

_WHERE: Final = {
    "accel_trainer": ("AccelTrainer",),
    "arguments": (
        "Seq2SeqTrainingArguments",
        "TrainingArguments",
    ),
    "abstract": ("AbstractBaseTrainer", "ExtensibleTrainer"),
    "base_trainer": ("BaseTrainer",),
    "callbacks": (
        "CallbackHandler",
        "DefaultFlowCallback",
        "DivergenceDetector",
        "EarlyStoppingCallback",
        "GradLogger",
        "InfoCallback",
        "JsonLogger",
        "PeakMemory",
        "PrinterCallback",
        "ProfilerCallback",
        "ProgressCallback",
        "TBLogger",
        "TextgenCallback",
        "TrainerCallback",
        "TrainerControlCallback",
    ),
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
        "ExportableState",
        "PredictionOutput",
        "TrainOutput",
        "TrainerControl",
        "TrainerState",
        "get_last_checkpoint",
        "speed_metrics",
    ),
}
"""In which module of this package each name is."""

_HOME: Final = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
