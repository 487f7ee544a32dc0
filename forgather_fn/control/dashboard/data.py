"""What the page shows, as plain data."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from forgather_fn.checkpoint import list_checkpoints
from forgather_fn.control import jobs
from forgather_fn.control.client import ask, ask_status, target
from forgather_fn.control.command import Command, ControlError
from forgather_fn.reports.jsonl import read

POINTS: Final = 600
"""How many points of a curve are sent at most."""
CURVES: Final = ("loss", "eval_loss", "learning_rate")
PATIENCE: Final = 20.0
"""Seconds that the page waits for a command to have happened; the command stands also after that."""


def job_list() -> list[dict[str, Any]]:
    """List the jobs of this user."""
    return [
        {
            "job": one.job,
            "state": "refused" if one.fault else "running" if one.running else "dead",
            "run": one.endpoint.run if one.endpoint else None,
            "fault": one.fault,
        }
        for one in jobs.list_jobs()
    ]


def job_details(job: str) -> dict[str, Any]:
    """Tell all of one job: its status, the curves of its run, and its checkpoints.

    Raises:
        ControlError: There is no such job.
    """
    found = [one for one in jobs.list_jobs() if one.job == job]
    if not found or found[0].endpoint is None:
        raise ControlError(f"there is no job {job!r} that can be shown")
    run = found[0].endpoint.run
    try:
        status, error = ask_status(target(jobs.find(job))), None
    except ControlError as failed:
        status, error = None, str(failed)
    return {
        "job": job,
        "run": run,
        "status": status,
        "error": error,
        "curves": curves(Path(run) / "metrics.jsonl") if run else {},
        "checkpoints": checkpoints(run) if run else [],
    }


def command(job: str, name: str) -> dict[str, Any]:
    """Ask a job for something, and wait a while for it to have happened.

    Raises:
        ControlError: There is no such job or command, or it answered that it was not done.
    """
    if name not in list(Command):
        raise ControlError(f"unknown command; there are {', '.join(Command)}")
    return ask(target(jobs.find(job)), Command(name), timeout=PATIENCE)


def curves(path: Path) -> dict[str, list[tuple[float, float | None]]]:
    """Read the curves of a run, thinned; a value that is not finite is None. What cannot be read gives none."""
    try:
        rows = read(path)
    except ValueError:
        return {}
    return {name: points for name in CURVES if (points := _thinned(rows, name))}


def _thinned(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float | None]]:
    points = [(row["step"], row[name] if math.isfinite(row[name]) else None) for row in rows if name in row]
    stride = max(math.ceil(len(points) / POINTS), 1)
    thinned = points[::stride]
    return thinned if not points or thinned[-1] == points[-1] else [*thinned, points[-1]]


def checkpoints(run: str) -> list[dict[str, Any]]:
    """List the checkpoints of a run, newest first."""
    return [
        {
            "step": entry.step,
            "name": entry.path.name,
            "time": entry.manifest.time if entry.manifest else None,
            "bytes": sum(file.size for file in entry.manifest.files.values()) if entry.manifest else None,
            "faults": "; ".join(entry.faults),
            "metrics": {name: str(value) for name, value in entry.manifest.metrics.items()} if entry.manifest else {},
        }
        for entry in reversed(list_checkpoints(run))
    ]
