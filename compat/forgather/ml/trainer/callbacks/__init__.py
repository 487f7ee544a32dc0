"""Callbacks: what looks at a run and may ask it to log, evaluate, save, or stop."""

from forgather.ml.trainer.callbacks.base import TrainerCallback as TrainerCallback
from forgather.ml.trainer.callbacks.dispatch import CallbackHandler as CallbackHandler
from forgather.ml.trainer.callbacks.early_stopping import EarlyStoppingCallback as EarlyStoppingCallback
from forgather.ml.trainer.callbacks.flow import DefaultFlowCallback as DefaultFlowCallback
from forgather.ml.trainer.callbacks.progress import PrinterCallback as PrinterCallback
from forgather.ml.trainer.callbacks.progress import ProgressCallback as ProgressCallback
from forgather.ml.trainer.callbacks.tensorboard import TBLogger as TBLogger
from forgather.ml.trainer.trainer_types import ExportableState as ExportableState
from forgather.ml.trainer.trainer_types import TrainerControl as TrainerControl
from forgather.ml.trainer.trainer_types import TrainerState as TrainerState
