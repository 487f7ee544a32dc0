"""Pipelines: a model cut into stages by the names of its modules, and the schedules that run them."""

from typing import TYPE_CHECKING

from forgather_fn.deferred import deferred_names

if TYPE_CHECKING:
    from forgather_fn.pipeline.balance import balanced, measured
    from forgather_fn.pipeline.cuts import SplitError
    from forgather_fn.pipeline.explaining import Explanation, explain
    from forgather_fn.pipeline.schedules import ScheduleError
    from forgather_fn.pipeline.stages import Stages

__all__ = ["Explanation", "ScheduleError", "SplitError", "Stages", "balanced", "explain", "measured"]

if not TYPE_CHECKING:  # for whom a module with a __getattr__ has any name
    __getattr__, __dir__ = deferred_names(
        __name__,
        {
            "balance": "balanced measured",
            "cuts": "SplitError",
            "explaining": "Explanation explain",
            "schedules": "ScheduleError",
            "stages": "Stages",
        },
    )
