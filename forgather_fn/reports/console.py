"""Rows as plain text, one line each, for logs."""

import math
import sys
from typing import TextIO

from forgather_fn.reports.row import Row, Sink, remaining, sink


def console(stream: TextIO | None = None) -> Sink:
    """Print each row as one aligned line, flushed, without control characters.

    Args:
        stream: Where to; None for the standard output at the time of each row.

    Example:
        >>> console()(Row(step=10, samples=320, horizon=1000, seconds=12.0, values={"loss": 2.5}))
        step   10/1000   0:00:12 <  0:19:48  loss    2.5000
    """

    def write(row: Row) -> None:
        target = sys.stdout if stream is None else stream
        target.write(f"{line(row)}\n")
        target.flush()

    return sink(write)


def line(row: Row) -> str:
    """Format a row: the step, the time taken and left, the epoch where known, and the values in their order."""
    end = "" if row.horizon is None else f"/{row.horizon}"
    width = 8 if row.horizon is None else len(str(row.horizon))
    fields = [f"step {row.step:>{width}}{end}", f"{clock(row.seconds):>8} < {clock(remaining(row)):>8}"]
    if row.epoch is not None:
        fields.append(f"epoch {row.epoch:8.4f}")
    fields += [f"{name} {short(name, value):>9}" for name, value in row.values.items()]
    return "  ".join(fields)


def short(name: str, value: float) -> str:
    """Format a value in about eight characters, in a form that depends on its name and size only.

    Four decimals; one for what is counted per second; none from a thousand on; an exponent for what that would round
    away, which for rates (names that end in ``_rate``) begins at a tenth, and from ten million on.

    Example:
        >>> short("loss", 2.34567), short("learning_rate", 3e-4), short("tokens_per_second", 81234.5)
        ('2.3457', '3.00e-04', '81234')
    """
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if 0 < size < (0.1 if name.endswith("_rate") else 1e-3) or size >= 1e7:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if name.endswith("_per_second") else f"{value:.4f}"


def clock(seconds: float | None) -> str:
    """Format a duration as hours, minutes and seconds; one that is not known as a question mark.

    Example:
        >>> clock(3725.9), clock(None)
        ('1:02:05', '?')
    """
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
