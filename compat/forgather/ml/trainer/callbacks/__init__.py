"""Callbacks: what looks at a run and may ask it to log, evaluate, save, or stop.

Names are loaded when they are first asked for.
"""

from typing import Final

from forgather.ml.when_used import when_used

_WHERE: Final = {
    "DivergenceDetector": "callbacks.divergence",
    "EarlyStoppingCallback": "callbacks.early_stopping",
    "GradLogger": "callbacks.gradients",
    "InfoCallback": "callbacks.info",
    "JsonLogger": "callbacks.json_logger",
    "PeakMemory": "callbacks.memory",
    "ProfilerCallback": "callbacks.profiler",
    "PrinterCallback": "callbacks.progress",
    "ProgressCallback": "callbacks.progress",
    "TBLogger": "callbacks.tensorboard",
    "TextgenCallback": "callbacks.textgen",
    "TrainerControlCallback": "callbacks.trainer_control",
    "TrainerCallback": "callbacks.base",
    "CallbackHandler": "callbacks.dispatch",
    "DefaultFlowCallback": "callbacks.flow",
    "ExportableState": "trainer_types",
    "TrainerControl": "trainer_types",
    "TrainerState": "trainer_types",
}
"""In which module of the package around this one each name is."""

__all__ = sorted(_WHERE)
__getattr__ = when_used(__name__, {name: f"forgather.ml.trainer.{module}" for name, module in _WHERE.items()})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
