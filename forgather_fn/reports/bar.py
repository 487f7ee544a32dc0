"""Rows as a progress bar."""

import sys
from typing import TYPE_CHECKING, NoReturn, TextIO

from forgather_fn.reports.console import clock, short
from forgather_fn.reports.row import Row, Sink, opened, remaining

if TYPE_CHECKING:
    from tqdm import tqdm

_SHOWN = {
    "loss": "loss {}",
    "learning_rate": "lr {}",
    "samples_per_second": "{} samples/s",
    "tokens_per_second": "{} tokens/s",
}


def bar(description: str = "", stream: TextIO | None = None) -> Sink:
    """Show the last row as a tqdm bar: step, loss, learning rate, samples and tokens per second, time taken and left.

    Times and rates are those of the rows, not of tqdm's clock. The bar begins at ``row.started``, so that a resumed run
    goes on where it was. Where the stream is not a terminal, nothing is written at all (see :func:`console` for logs).

    Args:
        description: Printed before the bar.
        stream: A terminal; None for the standard error at the time of the first row.
    """

    def open(row: Row) -> "tqdm[NoReturn] | None":
        target = sys.stderr if stream is None else stream
        if not target.isatty():
            return None
        from tqdm import tqdm

        prefix = f"{description}: " if description else ""
        layout = _layout(row)
        return tqdm(
            desc=prefix, total=row.horizon, initial=row.started, file=target, dynamic_ncols=True, bar_format=layout
        )

    def write(bar: "tqdm[NoReturn] | None", row: Row) -> None:
        if bar is None:
            return
        bar.n, bar.total, bar.bar_format = row.step, row.horizon, _layout(row)
        bar.set_postfix_str(_figures(row), refresh=False)
        bar.refresh()

    def close(bar: "tqdm[NoReturn] | None") -> None:
        if bar is not None:
            bar.close()

    return opened(f"bar({description!r})", open, write, close)


def _layout(row: Row) -> str:
    if row.horizon is None or row.step > row.horizon:
        return "{desc}step {n_fmt}{postfix}"
    return "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


def _figures(row: Row) -> str:
    shown = [text.format(short(name, row.values[name])) for name, text in _SHOWN.items() if name in row.values]
    return ", ".join([*shown, f"{clock(row.seconds)} < {clock(remaining(row))}"])
