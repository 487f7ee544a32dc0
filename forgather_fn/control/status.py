"""What a job tells of itself."""

import time
from typing import Any

from forgather_fn.checkpoint import list_checkpoints
from forgather_fn.control.endpoint import Endpoint
from forgather_fn.control.inbox import Inbox


def status(inbox: Inbox, endpoint: Endpoint) -> dict[str, Any]:
    """Say where a job is, from what is known without asking the device; as plain data.

    Times are in seconds, instants in seconds since 1970. What is not known is None.
    """
    progress, numbers, now = inbox.progress, inbox.numbers, time.time()
    values = dict(numbers.values) if numbers else {}
    step, samples, _ = progress.at if progress else (None, None, None)
    rates = (progress.rates if progress else None) or (None, None)
    remaining = progress.remaining if progress else None
    return {
        "job": endpoint.job,
        "run": endpoint.run,
        "pid": endpoint.process.pid,
        "host": endpoint.process.host,
        "since": endpoint.since,
        "world_size": inbox.world_size,
        "step": step,
        "started": progress.started if progress else None,
        "horizon": progress.horizon if progress else None,
        "epoch": progress.epoch if progress else None,
        "samples": samples,
        "loss": values.pop("loss", None),
        "learning_rate": values.pop("learning_rate", None),
        "metrics": values,
        "metrics_step": numbers.step if numbers else None,
        "steps_per_second": rates[0],
        "samples_per_second": rates[1],
        "remaining": remaining,
        "estimated_end": now + remaining if remaining is not None else None,
        "checkpoint": _newest(inbox, now),
        "last_error": inbox.last_error or inbox.unattended,
        "waiting": [str(command) for command in inbox.waiting()],
        "ended": inbox.ended,
    }


def _newest(inbox: Inbox, now: float) -> dict[str, Any] | None:
    """Find the newest whole checkpoint; unlike ``latest`` this says nothing of damaged ones in the run's log."""
    if inbox.run is None:
        return None
    whole = [entry for entry in list_checkpoints(inbox.run) if entry.whole and entry.manifest]
    if not whole or whole[-1].manifest is None:
        return None
    newest = whole[-1]
    return {"path": str(newest.path), "step": newest.step, "age": max(now - whole[-1].manifest.time, 0.0)}
