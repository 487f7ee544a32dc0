"""Callbacks: what looks at a run and may ask it to log, evaluate, save, or stop.

Those that a trainer can do without are loaded when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from forgather.ml.trainer.callbacks.base import TrainerCallback as TrainerCallback
from forgather.ml.trainer.callbacks.dispatch import CallbackHandler as CallbackHandler
from forgather.ml.trainer.callbacks.flow import DefaultFlowCallback as DefaultFlowCallback
from forgather.ml.trainer.trainer_types import ExportableState as ExportableState
from forgather.ml.trainer.trainer_types import TrainerControl as TrainerControl
from forgather.ml.trainer.trainer_types import TrainerState as TrainerState

if TYPE_CHECKING:
    from forgather.ml.trainer.callbacks.divergence import DivergenceDetector as DivergenceDetector
    from forgather.ml.trainer.callbacks.early_stopping import EarlyStoppingCallback as EarlyStoppingCallback
    from forgather.ml.trainer.callbacks.gradients import GradLogger as GradLogger
    from forgather.ml.trainer.callbacks.info import InfoCallback as InfoCallback
    from forgather.ml.trainer.callbacks.json_logger import JsonLogger as JsonLogger
    from forgather.ml.trainer.callbacks.memory import PeakMemory as PeakMemory
    from forgather.ml.trainer.callbacks.profiler import ProfilerCallback as ProfilerCallback
    from forgather.ml.trainer.callbacks.progress import PrinterCallback as PrinterCallback
    from forgather.ml.trainer.callbacks.progress import ProgressCallback as ProgressCallback
    from forgather.ml.trainer.callbacks.tensorboard import TBLogger as TBLogger
    from forgather.ml.trainer.callbacks.textgen import TextgenCallback as TextgenCallback
    from forgather.ml.trainer.callbacks.trainer_control import TrainerControlCallback as TrainerControlCallback

_WHERE = {
    "DivergenceDetector": "divergence",
    "EarlyStoppingCallback": "early_stopping",
    "GradLogger": "gradients",
    "InfoCallback": "info",
    "JsonLogger": "json_logger",
    "PeakMemory": "memory",
    "ProfilerCallback": "profiler",
    "PrinterCallback": "progress",
    "ProgressCallback": "progress",
    "TBLogger": "tensorboard",
    "TextgenCallback": "textgen",
    "TrainerControlCallback": "trainer_control",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
