"""Pipelines: a model cut into stages by the names of its modules, and the schedules that run them."""

from forgather_fn.pipeline.balance import balanced as balanced
from forgather_fn.pipeline.balance import measured as measured
from forgather_fn.pipeline.cuts import SplitError as SplitError
from forgather_fn.pipeline.explain import Explanation as Explanation
from forgather_fn.pipeline.explain import explain as explain
from forgather_fn.pipeline.schedules import ScheduleError as ScheduleError
from forgather_fn.pipeline.stages import Stages as Stages
