"""``forgather plot``: runs as a picture."""

import argparse
from collections.abc import Callable
from pathlib import Path

from forgather_fn.reports.plot import plot


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of ``forgather plot`` to a parser, and give what draws."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run directory with a metrics.jsonl, or such a file"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("plot.png"),
        metavar="FILE",
        help=".png or .svg (default: %(default)s)",
    )
    parser.add_argument("--log", action="store_true", help="draw losses and norms on a logarithmic scale")
    parser.add_argument(
        "--smooth", type=int, default=1, metavar="ROWS", help="draw means of so many rows (default: %(default)s)"
    )
    parser.epilog = "example: forgather plot runs/a runs/b -o runs/compared.svg --log --smooth 9"

    def execute(options: argparse.Namespace) -> int:
        plot(options.runs, options.output, log=options.log, smooth=options.smooth)
        print(options.output)
        return 0

    return execute
