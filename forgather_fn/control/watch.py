"""A live view of a job in the terminal: what its status says, drawn again and again."""

import contextlib
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from forgather_fn.control.client import SilentError, UnreachableError
from forgather_fn.reports.jsonl import read
from forgather_fn.terminal import printable, span

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
WIDTH: Final = 40
"""Characters of the bar, and points of the line of losses."""


def watch(
    status: Callable[[], Mapping[str, Any]],
    out: TextIO,
    *,
    interval: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Draw a job's status until it ends; on a terminal in place, elsewhere one line a look.

    A job that is there and does not answer, as one that was stopped by Ctrl-Z, is asked again.

    Each look asks the job once, which costs it what a line of its log does.

    Args:
        status: Asks the job.
        out: Where to draw.
        interval: Seconds between looks.
        sleep: Waits; injected, so that tests need not.
    """
    losses: deque[float] = deque(maxlen=WIDTH)
    drawn = 0
    while True:
        try:
            found = status()
        except SilentError:
            out.write("the job does not answer; trying again\n")
            drawn = 0
            sleep(interval)
            continue
        except UnreachableError:
            out.write("the job has ended\n")
            return
        if not losses:
            losses.extend(_logged(found.get("run")))
        _note(losses, found)
        if out.isatty():
            width = shutil.get_terminal_size().columns - 1  # a line that wraps would not be drawn over
            lines = [line[:width] for line in view(found, losses)]
            out.write(f"\x1b[{drawn}F\x1b[J" if drawn else "")
            out.write("\n".join(lines) + "\n")
            drawn = len(lines)
        else:
            out.write(one_line(found) + "\n")
        out.flush()
        sleep(interval)


def view(status: Mapping[str, Any], losses: "deque[float]") -> list[str]:
    """Draw a status as a few lines: the bar, the loss and its line, pace, checkpoint, and what went wrong."""
    rate = status.get("steps_per_second")
    remaining = status.get("remaining")
    pace = [
        f"{rate:.3g} steps/s" if rate else "",
        f"{status['samples_per_second']:.3g} samples/s" if status.get("samples_per_second") else "",
        f"{span(remaining)} left" if remaining is not None else "",
    ]
    loss = [f"loss {_number(status.get('loss'))}", f"learning rate {_number(status.get('learning_rate'))}"]
    lines = [
        f"{status['job']}  {bar(status)}",
        f"  {sparkline(losses)}  {'  '.join(loss)}",
        f"  {'  '.join(part for part in pace if part)}",
        f"  {_checkpoint(status)}",
    ]
    if status.get("last_error"):
        lines.append(f"  last error: {status['last_error']}")
    return [printable(line) for line in lines]


def one_line(status: Mapping[str, Any]) -> str:
    """Tell a status in one line, for files and pipes."""
    remaining = status.get("remaining")
    left = f"  {span(remaining)} left" if remaining is not None else ""
    return printable(f"{status['job']}  step {status.get('step')}  loss {_number(status.get('loss'))}{left}")


def bar(status: Mapping[str, Any]) -> str:
    """Draw how far a run is; the step alone, where its end is not known.

    Example:
        >>> bar({"step": 25, "horizon": 100})[:20].rstrip()
        '██████████'
    """
    step, horizon = status.get("step"), status.get("horizon")
    epoch = f"  epoch {status['epoch']:.2f}" if isinstance(status.get("epoch"), float) else ""
    if step is None:
        return "has not made a step yet"
    if not horizon:
        return f"step {step}{epoch}"
    eighths = round(min(step / horizon, 1.0) * WIDTH * 8)
    whole, part = divmod(eighths, 8)
    drawn = "█" * whole + (_EIGHTHS[part] if part else "")
    return f"{drawn:{WIDTH}} {step / horizon:4.0%}  step {step} of {horizon}{epoch}"


def sparkline(values: "deque[float]") -> str:
    """Draw values as a line of blocks, scaled to the least and greatest of them; a gap for one that is not finite.

    Example:
        >>> sparkline(deque([1.0, 2.0, 3.0]))
        '▁▅█'
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[math.floor((v - low) * scale + 0.5)] if math.isfinite(v) else " " for v in values)


def _note(losses: "deque[float]", status: Mapping[str, Any]) -> None:
    loss = status.get("loss")
    if loss is not None:
        losses.append(float(loss))


def _logged(run: str | None) -> list[float]:
    """Begin with what the run has logged, as far as that can be read here."""
    if run is None:
        return []
    with contextlib.suppress(ValueError, OSError):
        rows = [row["loss"] for row in read(Path(run) / "metrics.jsonl") if "loss" in row]
        return rows[:: max(len(rows) // WIDTH, 1)][-WIDTH:]
    return []


def _checkpoint(status: Mapping[str, Any]) -> str:
    found = status.get("checkpoint")
    return f"checkpoint at step {found['step']}, {span(found['age'])} ago" if found else "no checkpoint yet"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
