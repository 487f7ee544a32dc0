"""The command line: each subcommand is one function, in the package of what it is about."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from forgather_fn import demo


class Command(Protocol):
    """A subcommand. What it needs beyond its arguments is imported when it runs."""

    def __call__(self, parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
        """Add arguments to the parser; give the function that takes them, runs, and returns the exit code."""
        ...


COMMANDS: Final[Mapping[str, tuple[str, Command]]] = {
    "demo": ("train a small language model on text that every machine has", demo.command),
}
"""Each subcommand by name, with what it does in one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    What a user can set right (``ValueError``) is told in one line on the standard error.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code: 0, or 2 for an error of the user's, or 130 for Ctrl-C.

    Raises:
        SystemExit: The arguments cannot be parsed (2), or ask for help (0).
    """
    options = _parser().parse_args(argv)
    try:
        code: int = options.execute(options)
    except ValueError as error:
        if options.debug:
            raise
        print(f"forgather: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("forgather: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="forgather", description="Training as a fold.", allow_abbrev=False)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (summary, command) in COMMANDS.items():
        own = subparsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        execute = command(own)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        own.set_defaults(execute=execute)
    return parser
