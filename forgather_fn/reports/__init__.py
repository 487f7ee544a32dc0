"""Where the numbers of a running training go: rows, and the sinks that take them."""

from forgather_fn.reports.bar import bar as bar
from forgather_fn.reports.console import console as console
from forgather_fn.reports.curve import curve as curve
from forgather_fn.reports.jsonl import jsonl as jsonl
from forgather_fn.reports.jsonl import read as read
from forgather_fn.reports.plot import plot as plot
from forgather_fn.reports.row import Row as Row
from forgather_fn.reports.row import Sink as Sink
from forgather_fn.reports.row import opened as opened
from forgather_fn.reports.row import remaining as remaining
from forgather_fn.reports.row import sink as sink
from forgather_fn.reports.tensorboard import tensorboard as tensorboard
from forgather_fn.reports.throughput import Count as Count
from forgather_fn.reports.throughput import throughput as throughput
from forgather_fn.reports.trackers import mlflow as mlflow
from forgather_fn.reports.trackers import trackio as trackio
from forgather_fn.reports.trackers import wandb as wandb

__all__ = [
    "Count",
    "Row",
    "Sink",
    "bar",
    "console",
    "curve",
    "jsonl",
    "mlflow",
    "opened",
    "plot",
    "read",
    "remaining",
    "sink",
    "tensorboard",
    "throughput",
    "trackio",
    "wandb",
]
