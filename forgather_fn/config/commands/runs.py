"""``forgather runs``, ``forgather config`` and ``forgather tb``: what was run, and how the runs differ."""

import argparse
import difflib
import math
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import attrs

from forgather_fn.checkpoint import latest
from forgather_fn.config import record as records
from forgather_fn.config.arguments import arguments, differences
from forgather_fn.config.commands.common import add_allow_folders
from forgather_fn.config.emit import inline
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.load import load
from forgather_fn.config.record import Record
from forgather_fn.config.scalars import Value
from forgather_fn.reports import read as read_rows
from forgather_fn.terminal import printable

Execute = Callable[[argparse.Namespace], int]


@attrs.frozen
class Run:
    """A run that was found.

    Attributes:
        name: Of its directory, below the one that was searched.
        record: How it was made.
        step: Of its last report or checkpoint.
        metric: The last value; None where there is none.
        known: The names of all that it has.
    """

    name: str
    record: Record
    step: int
    metric: float | None
    known: frozenset[str] = frozenset()


def command(parser: argparse.ArgumentParser, /) -> Execute:
    """Add the arguments of ``forgather runs`` to a parser, and give what prints the table."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the runs are")
    parser.add_argument("--metric", default="eval_loss", metavar="NAME", help="sort by this (default: %(default)s)")
    parser.add_argument("--greater", action="store_true", help="greater is better")
    parser.epilog = "example: forgather runs runs/mine --metric eval_loss"

    def execute(options: argparse.Namespace) -> int:
        found = [_run(path.parent, options) for path in sorted(options.directory.rglob(records.NAME)) if _is_run(path)]
        if not found:
            raise ConfigError(f"{options.directory} has no runs of forgather train")
        if all(run.metric is None for run in found):
            _tell_of_metrics(options.metric, {name for run in found for name in run.known})
        for line in table(sorted(found, key=lambda run: _rank(run, options.greater)), options.metric):
            print(printable(line))
        return 0

    return execute


def _tell_of_metrics(metric: str, known: Collection[str]) -> None:
    """Say which metrics there are, where no run has the one that was asked for."""
    near = difflib.get_close_matches(metric, known, n=5, cutoff=0.0)
    listed = f"; they have {', '.join(map(repr, near))}" if near else ""
    print(printable(f"no run has a metric {metric!r}{listed}"), file=sys.stderr)


def _is_run(path: Path) -> bool:
    return path.parent.parent.name != "checkpoints"


def _run(path: Path, options: argparse.Namespace) -> Run:
    rows = read_rows(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else []
    known = [row[options.metric] for row in rows if options.metric in row]
    entry = latest(path)
    if not known and entry is not None and entry.manifest is not None:
        known = [value for name, value in entry.manifest.metrics.items() if name == options.metric]
    step = max([int(row["step"]) for row in rows[-1:]] + ([entry.step] if entry else []), default=0)
    name = path.relative_to(options.directory).as_posix()
    names = frozenset(name for row in rows for name in row)
    if entry is not None and entry.manifest is not None:
        names |= entry.manifest.metrics.keys()
    return Run(path.name if name == "." else name, records.read(path), step, known[-1] if known else None, names)


def _rank(run: Run, greater: bool) -> tuple[bool, float]:
    unknown = run.metric is None or math.isnan(run.metric)
    return unknown, 0.0 if run.metric is None or unknown else (-run.metric if greater else run.metric)


def table(runs: Sequence[Run], metric: str) -> list[str]:
    """Lay out runs in lines: the name, the step, the metric, and each argument in which they differ."""
    paths = dict.fromkeys(path for run in runs for path in run.record.arguments)
    differing = [path for path in paths if len({_shown(run.record.arguments, path) for run in runs}) > 1]
    heads = ["run", "step", metric, *(_short(path, differing) for path in differing)]
    rows = [
        [
            run.name,
            str(run.step),
            "-" if run.metric is None else f"{run.metric:.6g}",
            *(_shown(run.record.arguments, path) for path in differing),
        ]
        for run in runs
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]]


def _shown(arguments: Mapping[str, Value], path: str) -> str:
    return inline(arguments[path]) if path in arguments else "-"


def _short(path: str, others: Iterable[str]) -> str:
    """Give the last part of a path, if no other ends alike."""
    last = path.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in others) == 1 else path


def config(parser: argparse.ArgumentParser, /) -> Execute:
    """Add the arguments of ``forgather config`` to a parser, and give what shows or compares records."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=("show", "diff"), help="what to do")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or one of its checkpoints")
    parser.add_argument(
        "--part",
        choices=("summary", "arguments", "rendered", "graph", "templates", "command"),
        default="summary",
        help="what to show (default: %(default)s)",
    )
    add_allow_folders(parser)
    parser.epilog = (
        "diff of one run compares it with its configuration as it is now; the exit code is 1 where they differ\n\n"
        "examples:\n  forgather config show runs/a --part graph\n  forgather config diff runs/a runs/b"
    )

    def execute(options: argparse.Namespace) -> int:
        if options.action == "show":
            for run in options.runs:
                print("\n".join(map(printable, show(records.read(run), options.part))))
            return 0
        changed = _compared(options.runs, options.allow)
        for path, before, after in changed:
            print(printable(f"{path}: {before} -> {after}"))
        return 1 if changed else 0

    return execute


def _compared(runs: Sequence[Path], allow: Sequence[str]) -> list[tuple[str, str, str]]:
    if len(runs) > 2:
        raise ConfigError(f"config diff compares one or two runs, got {len(runs)}; forgather runs compares more")
    old = records.read(runs[0])
    if len(runs) == 2:
        return differences(old.arguments, records.read(runs[1]).arguments)
    now = load(old.config, {**old.overrides}, defaults=old.variables, allow=allow)
    return differences(old.arguments, arguments(now.graph, old.target, _recorded(now.variables)))


def _recorded(variables: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in variables.items() if name != "output_dir"}


_CHANGED: Final[Mapping[object, str]] = {True: " (changed)", None: " (perhaps changed)"}


def show(record: Record, part: str) -> list[str]:
    """Write a part of a record in lines."""
    if part == "arguments":
        return [f"{path}: {inline(value)}" for path, value in record.arguments.items()]
    if part == "rendered":
        return record.rendered.split("\n")
    if part == "graph":
        return record.graph.rstrip("\n").split("\n")
    if part == "templates":
        return [line for name, text in record.templates.items() for line in (f"## {name}", *text.split("\n"))]
    if part == "command":
        return [" ".join(record.command)]
    git = record.git
    fields = {
        "configuration": record.config,
        "hash": record.hash,
        "command": " ".join(record.command),
        "templates": ", ".join(record.templates),
        "git": f"{git['revision']}{_CHANGED.get(git['dirty'], '')}" if git else "none",
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "secrets": "taken out" if record.redacted else "none",
    }
    lines = [f"{name:14} {value}" for name, value in fields.items()]
    return [*lines, "variables", *(f"  {name}: {inline(value)}" for name, value in record.variables.items())]


def tensorboard(parser: argparse.ArgumentParser, /) -> Execute:
    """Add the arguments of ``forgather tb`` to a parser, and give what opens TensorBoard on a run."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or a folder of such")
    parser.add_argument(
        "--port", type=int, default=6006, metavar="N", help="where TensorBoard listens (default: %(default)s)"
    )
    parser.epilog = "example: forgather tb runs/mine"

    def execute(options: argparse.Namespace) -> int:
        if not options.run.is_dir():
            raise ConfigError(f"{options.run} is not there: expected a run directory, or a folder of such")
        arguments = ["--logdir", str(options.run), "--port", str(options.port)]
        return subprocess.run([sys.executable, "-m", "tensorboard.main", *arguments], check=False).returncode

    return execute
