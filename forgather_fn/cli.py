"""The command line: each subcommand is one function, in the package of what it is about."""

import argparse
import difflib
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from forgather_fn.interrupt import INTERRUPTED
from forgather_fn.terminal import lines_of


class Command(Protocol):
    """A subcommand."""

    def __call__(self, parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
        """Add arguments to the parser; give the function that takes them, runs, and returns the exit code."""
        ...


COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "demo": ("train a small language model on text that every machine has", "forgather_fn.demo:command"),
    "train": ("train what a configuration says", "forgather_fn.config.commands.train:command"),
    "launch": ("train in several processes, on this machine or on several", "forgather_fn.distributed.cli:command"),
    "pp": ("print what a configuration renders to", "forgather_fn.config.commands.inspect:pp"),
    "graph": ("print what a configuration says, templates resolved", "forgather_fn.config.commands.inspect:graph"),
    "targets": ("list what a configuration can build", "forgather_fn.config.commands.inspect:targets"),
    "code": ("print a configuration as Python source", "forgather_fn.config.commands.inspect:code"),
    "construct": ("build a target of a configuration, and show it", "forgather_fn.config.commands.inspect:construct"),
    "trefs": ("list the templates that a configuration uses", "forgather_fn.config.commands.inspect:trefs"),
    "ls": ("list the configurations that there are", "forgather_fn.config.commands.listing:command"),
    "tb": ("open TensorBoard on a run", "forgather_fn.config.commands.runs:tensorboard"),
    "config": ("show or compare the configurations of runs", "forgather_fn.config.commands.runs:config"),
    "runs": ("compare runs by a metric, and by what differs", "forgather_fn.config.commands.runs:command"),
    "plot": ("draw loss, learning rate and gradient norm of runs, compared", "forgather_fn.reports.cli:command"),
    "pipeline": ("show what a pipeline would be: stages, schedule, waiting", "forgather_fn.pipeline.cli:command"),
    "completion": ("print what a shell needs to complete commands", "forgather_fn.completion:command"),
    "control": ("see and command runs that are going on", "forgather_fn.control.cli:command"),
    "dashboard": (
        "show runs that are going on in the browser, and command them",
        "forgather_fn.control.dashboard.cli:command",
    ),
    "checkpoint": ("list, verify or show the checkpoints of a run", "forgather_fn.checkpoint.cli:command"),
    "replay": (
        "execute one step of a run again, to the bit, and show what it did",
        "forgather_fn.checkpoint.cli:replay_command",
    ),
}
"""Each subcommand by name: what it does, in one line, and where its :class:`Command` is, imported when it is chosen."""

_EXIT_CODES: Final = """exit codes:
  0    it was done
  1    something was found: a damaged checkpoint, a difference, a failed run of several
  2    something was asked for that cannot be done; what, and how to set it right, is said
  3    the run was aborted by forgather control; nothing was saved
  75   the run was told to end, and saved: run it again with --resume
  130  Ctrl-C has ended it; a training has saved after the first, and --resume goes on
  141  what reads the output has ended"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    What a user can set right (``ValueError``), and what the system refuses (``OSError``), is told in one line on the
    standard error.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code: the command's, or 2 for an error of the user's, or 130 for Ctrl-C.

    Raises:
        SystemExit: The arguments cannot be parsed (2), or ask for help (0).
    """
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.exit(2, parser.format_help())
    chosen = parser.parse_args(argv)
    before = [("--template", chosen.template), ("--project-dir", chosen.project_dir)]
    arguments = [part for name, value in before if value is not None for part in (name, value)] + chosen.arguments
    try:
        options = _parsed(_command_parser(chosen.command), arguments)
        options.command_line = ["forgather", *(sys.argv[1:] if argv is None else argv)]
        code: int = options.execute(options)
    except BrokenPipeError:  # whoever read the output has read enough; nothing is left to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as error:
        print(lines_of(": ".join(["forgather: interrupted", *map(str, error.args)])), file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if "--debug" in arguments:
            raise
        print(lines_of(f"forgather: error: {error}"), file=sys.stderr)
        return 2
    return code


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command; twice, where what they say adds options to it (its default ``declare``)."""
    declare = parser.get_default("declare")
    if declare is not None:
        known, unknown = parser.parse_known_args([one for one in arguments if one not in ("-h", "--help")])
        declare(parser, known, unknown)
    return parser.parse_args(arguments)


def options_of() -> dict[str, list[str]]:
    """List the options of each command, for the completion of a shell."""
    parsers = {name: _command_parser(name) for name in COMMANDS}
    return {
        name: sorted(flag for action in parser._actions for flag in action.option_strings)
        for name, parser in parsers.items()
    }


def _parser() -> argparse.ArgumentParser:
    """Make the parser of everything up to the command's name; what follows is the command's."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, (summary, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="forgather",
        usage="%(prog)s [-t CONFIG] [-p DIR] COMMAND ...",
        description="Training as a fold.",
        epilog=f"commands:\n{commands}\n\nforgather COMMAND --help tells of one of them.\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-t", "--template", metavar="CONFIG", help="the configuration that the command is about")
    parser.add_argument("-p", "--project-dir", metavar="DIR", help="the project that the command is about")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version of forgather-fn")
    parser.add_argument("command", type=_known, metavar="COMMAND", help="one of those below")
    rest = parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # as of Python 3.12; before, a command that is missing is told as two things that are
    return parser


def _known(name: str) -> str:
    if name in COMMANDS:
        return name
    near = difflib.get_close_matches(name, COMMANDS, n=3) or sorted(COMMANDS)
    raise argparse.ArgumentTypeError(f"{name!r} is unknown: expected {' or '.join(near)}; forgather --help lists all")


class _Version(argparse.Action):
    """Look the version up when it is asked for: that takes longer than everything else here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        try:
            found = importlib.metadata.version("forgather-fn")
        except importlib.metadata.PackageNotFoundError:
            found = "(not installed)"
        print(f"forgather-fn {found}")
        parser.exit()


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
