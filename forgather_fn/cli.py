"""The command line: each subcommand is one function, in the package of what it is about."""

import argparse
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol


class Command(Protocol):
    """A subcommand."""

    def __call__(self, parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
        """Add arguments to the parser; give the function that takes them, runs, and returns the exit code."""
        ...


COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "demo": ("train a small language model on text that every machine has", "forgather_fn.demo:command"),
    "checkpoint": ("list, verify or show the checkpoints of a run", "forgather_fn.checkpoint.cli:command"),
    "replay": (
        "execute one step of a run again, to the bit, and show what it did",
        "forgather_fn.checkpoint.cli:replay_command",
    ),
}
"""Each subcommand by name: what it does, in one line, and where its :class:`Command` is, imported when it is chosen."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    What a user can set right (``ValueError``) is told in one line on the standard error.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code: the command's, or 2 for an error of the user's, or 130 for Ctrl-C.

    Raises:
        SystemExit: The arguments cannot be parsed (2), or ask for help (0).
    """
    chosen = _parser().parse_args(argv)
    options = _command_parser(chosen.command).parse_args(chosen.arguments)
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
    """Make the parser of everything up to the command's name; what follows is the command's."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, (summary, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="forgather",
        usage="%(prog)s COMMAND ...",
        description="Training as a fold.",
        epilog=f"commands:\n{commands}\n\nforgather COMMAND --help tells of one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _command_parser(name: str) -> argparse.ArgumentParser:
    summary, place = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"forgather {name}", description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    command: Command = pkgutil.resolve_name(place)
    execute = command(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(execute=execute)
    return parser
