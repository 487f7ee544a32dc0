"""Pipelines: a model cut into stages by the names of its modules, and the schedules that run them."""

from forgather_fn.pipeline.cuts import SplitError as SplitError
