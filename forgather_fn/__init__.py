"""Training as a fold of a pure step over a stream of batches."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from forgather_fn import data, losses, metrics, optim, reducers, schedules, transforms
from forgather_fn.average import ema, power_ema, swa
from forgather_fn.changes import changing, folded, rollback
from forgather_fn.compiler import CompileError
from forgather_fn.data import Batch, Stream, batches
from forgather_fn.endings import early_stopped, stopped_by, until
from forgather_fn.functional import frozen
from forgather_fn.gradient import Gradients
from forgather_fn.groups import group
from forgather_fn.interrupt import Preempted
from forgather_fn.joining import members
from forgather_fn.loop import Steps, Tick, fold, last
from forgather_fn.mean import Mean
from forgather_fn.observers import evaluated, report
from forgather_fn.optim import Optimizer, adam, adamw, from_torch, sgd
from forgather_fn.plan import Plan
from forgather_fn.program import Program
from forgather_fn.stages import Observer, at, at_end, every, every_seconds
from forgather_fn.state import ConsumedStateError, NonFiniteError, TrainState, difference
from forgather_fn.strategy.single import single
from forgather_fn.transforms import Transform, chain, clipped, noise, stateless

__all__ = [
    "Aborted",
    "Batch",
    "CompileError",
    "ConsumedStateError",
    "Gradients",
    "Mean",
    "NonFiniteError",
    "Observer",
    "Optimizer",
    "Plan",
    "Preempted",
    "Program",
    "Steps",
    "Stream",
    "Tick",
    "TrainState",
    "Transform",
    "accelerated",
    "adam",
    "adamw",
    "adapters",
    "at",
    "at_end",
    "batches",
    "chain",
    "changing",
    "checkpoint",
    "clipped",
    "control",
    "controlled",
    "data",
    "diagnostics",
    "difference",
    "early_stopped",
    "ema",
    "evaluated",
    "every",
    "every_seconds",
    "fold",
    "folded",
    "from_torch",
    "frozen",
    "group",
    "joined",
    "last",
    "lora",
    "losses",
    "members",
    "memory",
    "metrics",
    "noise",
    "optim",
    "pipelined",
    "power_ema",
    "reducers",
    "refreshed_statistics",
    "report",
    "rollback",
    "saved",
    "schedules",
    "serve",
    "sgd",
    "single",
    "stateless",
    "stopped_by",
    "swa",
    "testing",
    "transforms",
    "until",
]

if TYPE_CHECKING:
    from forgather_fn import adapters, checkpoint, control, diagnostics, testing
    from forgather_fn.adapters import lora
    from forgather_fn.checkpoint.saving import saved
    from forgather_fn.control.serving import serve
    from forgather_fn.control.stage import Aborted, controlled
    from forgather_fn.estimate import memory
    from forgather_fn.statistics import refreshed_statistics
    from forgather_fn.strategy.accelerated import accelerated
    from forgather_fn.strategy.joined import joined
    from forgather_fn.strategy.pipelined import pipelined

_WHEN_USED = {
    "adapters": "",
    "checkpoint": "",
    "control": "",
    "diagnostics": "",
    "testing": "",
    "saved": "checkpoint.saving",
    "accelerated": "strategy.accelerated",
    "joined": "strategy.joined",
    "pipelined": "strategy.pipelined",
    "lora": "adapters",
    "memory": "estimate",
    "refreshed_statistics": "statistics",
    "serve": "control.serving",
    "controlled": "control.stage",
    "Aborted": "control.stage",
}
"""Names whose modules are imported when they are first used."""


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _WHEN_USED:
        # With name and object, Python's traceback adds the nearest name that there is.
        missing = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(missing, name=name, obj=sys.modules[__name__])
    module = importlib.import_module(f"{__name__}.{_WHEN_USED[name] or name}")
    return getattr(module, name) if _WHEN_USED[name] else module
