"""Training as a fold of a pure step over a stream of batches.

Names are imported when they are first used, so that a command which needs no torch does not wait for it.
"""

from typing import TYPE_CHECKING

from forgather_fn.deferred import deferred_names

if TYPE_CHECKING:
    from forgather_fn import (
        adapters,
        checkpoint,
        control,
        data,
        diagnostics,
        losses,
        metrics,
        optim,
        reducers,
        reports,
        schedules,
        testing,
        transforms,
    )
    from forgather_fn.adapters import lora
    from forgather_fn.average import ema, power_ema, swa
    from forgather_fn.changes import changing, folded, rollback
    from forgather_fn.checkpoint.saving import saved
    from forgather_fn.compiler import CompileError
    from forgather_fn.control.serving import serve
    from forgather_fn.control.stage import Aborted, controlled
    from forgather_fn.data import Batch, Stream, batches
    from forgather_fn.endings import early_stopped, stopped_by, until
    from forgather_fn.estimate import memory
    from forgather_fn.functional import frozen
    from forgather_fn.gradient import Gradients
    from forgather_fn.groups import group
    from forgather_fn.interrupt import Preempted
    from forgather_fn.joining import members
    from forgather_fn.loop import Steps, Tick, fold, last
    from forgather_fn.mean import Mean
    from forgather_fn.observers import evaluated, report
    from forgather_fn.optim.adam import adam, adamw
    from forgather_fn.optim.base import Optimizer
    from forgather_fn.optim.from_torch import from_torch
    from forgather_fn.optim.sgd import sgd
    from forgather_fn.plan import Plan
    from forgather_fn.program import Program
    from forgather_fn.stages import Observer, at, at_end, every, every_seconds
    from forgather_fn.state import ConsumedStateError, NonFiniteError, TrainState, difference
    from forgather_fn.statistics import refreshed_statistics
    from forgather_fn.strategy.accelerated import accelerated
    from forgather_fn.strategy.joined import joined
    from forgather_fn.strategy.pipelined import pipelined
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
    "reports",
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

if not TYPE_CHECKING:  # for whom a module with a __getattr__ has any name
    __getattr__, __dir__ = deferred_names(
        __name__,
        {
            "": "adapters checkpoint control data diagnostics losses metrics optim reducers reports schedules testing "
            "transforms",
            "adapters": "lora",
            "average": "ema power_ema swa",
            "changes": "changing folded rollback",
            "checkpoint.saving": "saved",
            "compiler": "CompileError",
            "control.serving": "serve",
            "control.stage": "Aborted controlled",
            "data": "Batch Stream batches",
            "endings": "early_stopped stopped_by until",
            "estimate": "memory",
            "functional": "frozen",
            "gradient": "Gradients",
            "groups": "group",
            "interrupt": "Preempted",
            "joining": "members",
            "loop": "Steps Tick fold last",
            "mean": "Mean",
            "observers": "evaluated report",
            "optim.adam": "adam adamw",
            "optim.base": "Optimizer",
            "optim.from_torch": "from_torch",
            "optim.sgd": "sgd",
            "plan": "Plan",
            "program": "Program",
            "stages": "Observer at at_end every every_seconds",
            "state": "ConsumedStateError NonFiniteError TrainState difference",
            "statistics": "refreshed_statistics",
            "strategy.accelerated": "accelerated",
            "strategy.joined": "joined",
            "strategy.pipelined": "pipelined",
            "strategy.single": "single",
            "transforms": "Transform chain clipped noise stateless",
        },
    )
