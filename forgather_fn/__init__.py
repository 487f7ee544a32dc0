"""Training as a fold of a pure step over a stream of batches."""

import importlib
from typing import TYPE_CHECKING, Any

from forgather_fn import adapters as adapters
from forgather_fn import data as data
from forgather_fn import losses as losses
from forgather_fn import metrics as metrics
from forgather_fn import optim as optim
from forgather_fn import reducers as reducers
from forgather_fn import schedules as schedules
from forgather_fn import transforms as transforms
from forgather_fn.adapters import lora as lora
from forgather_fn.average import ema as ema
from forgather_fn.average import power_ema as power_ema
from forgather_fn.average import swa as swa
from forgather_fn.changes import changing as changing
from forgather_fn.changes import folded as folded
from forgather_fn.changes import rollback as rollback
from forgather_fn.compiler import CompileError as CompileError
from forgather_fn.data import Batch as Batch
from forgather_fn.data import Stream as Stream
from forgather_fn.data import batches as batches
from forgather_fn.endings import early_stopped as early_stopped
from forgather_fn.endings import stopped_by as stopped_by
from forgather_fn.endings import until as until
from forgather_fn.estimate import memory as memory
from forgather_fn.functional import frozen as frozen
from forgather_fn.gradient import Gradients as Gradients
from forgather_fn.groups import group as group
from forgather_fn.interrupt import Preempted as Preempted
from forgather_fn.joining import parts as parts
from forgather_fn.loop import Steps as Steps
from forgather_fn.loop import Tick as Tick
from forgather_fn.loop import fold as fold
from forgather_fn.loop import last as last
from forgather_fn.mean import Mean as Mean
from forgather_fn.observers import evaluated as evaluated
from forgather_fn.observers import report as report
from forgather_fn.optim import Optimizer as Optimizer
from forgather_fn.optim import adam as adam
from forgather_fn.optim import adamw as adamw
from forgather_fn.optim import from_torch as from_torch
from forgather_fn.optim import sgd as sgd
from forgather_fn.plan import Plan as Plan
from forgather_fn.program import Program as Program
from forgather_fn.stages import Observer as Observer
from forgather_fn.stages import at as at
from forgather_fn.stages import at_end as at_end
from forgather_fn.stages import every as every
from forgather_fn.stages import every_seconds as every_seconds
from forgather_fn.state import ConsumedStateError as ConsumedStateError
from forgather_fn.state import NonFiniteError as NonFiniteError
from forgather_fn.state import TrainState as TrainState
from forgather_fn.state import difference as difference
from forgather_fn.statistics import refreshed_statistics as refreshed_statistics
from forgather_fn.strategy.joined import joined as joined
from forgather_fn.strategy.pipelined import pipelined as pipelined
from forgather_fn.strategy.single import single as single
from forgather_fn.transforms import Transform as Transform
from forgather_fn.transforms import chain as chain
from forgather_fn.transforms import clipped as clipped
from forgather_fn.transforms import noise as noise
from forgather_fn.transforms import stateless as stateless

if TYPE_CHECKING:
    from forgather_fn import checkpoint as checkpoint
    from forgather_fn import control as control
    from forgather_fn import diagnostics as diagnostics
    from forgather_fn import testing as testing
    from forgather_fn.checkpoint.saving import saved as saved
    from forgather_fn.control.serving import serve as serve
    from forgather_fn.control.stage import Aborted as Aborted
    from forgather_fn.control.stage import controlled as controlled
    from forgather_fn.strategy.accelerated import accelerated as accelerated

_WHEN_USED = {
    "checkpoint": "",
    "control": "",
    "diagnostics": "",
    "testing": "",
    "saved": "checkpoint.saving",
    "accelerated": "strategy.accelerated",
    "serve": "control.serving",
    "controlled": "control.stage",
    "Aborted": "control.stage",
}
"""Names whose modules are imported when they are first used."""


def __getattr__(name: str) -> Any:
    if name not in _WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_WHEN_USED[name] or name}")
    return getattr(module, name) if _WHEN_USED[name] else module
