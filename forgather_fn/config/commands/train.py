"""``forgather train CONFIG``: run what a configuration says, and write down what it was."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

from forgather_fn.config import record as records
from forgather_fn.config.arguments import arguments, differences
from forgather_fn.config.commands.common import add_allow, add_source, all_settings, named, settings
from forgather_fn.config.errors import ConfigError
from forgather_fn.config.grid import points
from forgather_fn.config.load import OUTPUT, Loaded, again, load
from forgather_fn.distributed.launched import number_in
from forgather_fn.terminal import lines_of, printable

if TYPE_CHECKING:
    from forgather_fn.data import Stream
    from forgather_fn.program import Program

_ONE_PROCESS = "!partial:forgather_fn:single"
_EXAMPLES = """examples:
  forgather train projects/demo.yaml --set main.max_steps=200
  forgather train mine.yaml --resume
  forgather train mine.yaml --grid main.learning_rate=1e-3,3e-4 main.batch_size=8,16
  forgather train --from runs/mine"""


@runtime_checkable
class Trainer(Protocol):
    """A trainer of the class layer."""

    def train(self, resume_from_checkpoint: bool | str | None = None) -> Any:
        """Run it, from a checkpoint where one is named."""
        ...


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of ``forgather train`` to a parser, and give what runs it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_source(parser)
    add_allow(parser)
    parser.add_argument("-n", "--processes", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="PATH",
        help="go on from the run's latest checkpoint, or from this one",
    )
    parser.add_argument("--allow-changes", action="store_true", help="go on although the configuration was changed")
    parser.add_argument("--from", dest="source", metavar="RUN", help="make the run again that is recorded there")
    parser.add_argument("--grid", nargs="+", metavar="NAME=A,B", help="one run for each combination of these values")
    parser.epilog = _EXAMPLES

    def execute(options: argparse.Namespace) -> int:
        if options.processes != 1:
            return _launched(options)
        if options.grid:
            return _sweep(options)
        _run(_loaded(options, all_settings(options)), options)
        return 0

    return execute


def _loaded(options: argparse.Namespace, given: Mapping[str, str]) -> Loaded:
    if options.source is None:
        return load(named(options), given, project_dir=options.project_dir, allow=options.allow)
    if options.config or options.template:
        raise ConfigError("--from takes the configuration from the record: do not name another")
    record = records.read(options.source)
    _tell_versions(record)
    return again(record, given, settings(options.settings).get(OUTPUT) or _free(options.source.rstrip("/") + "-again"))


def _run(loaded: Loaded, options: argparse.Namespace) -> None:
    from forgather_fn.checkpoint import latest
    from forgather_fn.checkpoint.lock import locked
    from forgather_fn.training import Training, noting

    run = Path(str(loaded.variables[OUTPUT]))
    record = loaded.record("main", options.command_line)
    _check_run(run, record, options)
    main = loaded.build("main", options.allow)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        with locked(run):
            records.write(run, record)
        print(f"run    {run} (configuration {record.hash[:12]})", flush=True)
    resume = Path(options.resume) if isinstance(options.resume, str) else bool(options.resume and latest(run))
    signals: list[int] = []
    if isinstance(main, Training):  # a trainer of the class layer leaves Ctrl-C to Python
        main = attrs.evolve(main, stages=(*main.stages, noting(signals)))
    result = start(main, resume, changes=options.allow_changes)
    if first:
        _tell(result)
    if signal.SIGINT in signals:
        found = latest(run)
        raise KeyboardInterrupt(f"{run} is saved at step {found.step}; --resume goes on from there" if found else run)


def start(main: Any, resume: bool | Path, *, changes: bool) -> Any:
    """Run what a configuration has built.

    Args:
        main: A :class:`~forgather_fn.training.Training`, or a trainer of the class layer.
        resume: As :meth:`forgather_fn.training.Training.state` takes it.
        changes: Whether the plan may differ from the checkpoint's.

    Returns:
        What it gives: the final state, or what the trainer returns.

    Raises:
        ConfigError: It is neither.
    """
    from forgather_fn.checkpoint.restoring import ALLOWED
    from forgather_fn.training import Training

    if isinstance(main, Training):
        return main.train(resume, allow=ALLOWED if changes else ())
    if isinstance(main, Trainer):
        return main.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume or None)
    raise ConfigError(f"main is {type(main).__name__}: expected a Training, or something with a method train")


def rebuilt(run: Path, allow: Collection[str] = ()) -> "tuple[Program, Stream]":
    """Make the program and the stream of a run again from its record, for ``forgather replay``.

    Raises:
        ConfigError: It was trained by a trainer of the class layer, or builds what is not allowed.
    """
    from forgather_fn.training import Training

    main = again(records.read(run), {}, str(run)).build("main", allow)
    if not isinstance(main, Training):
        raise ConfigError(
            f"{run} was made by {type(main).__name__}, of which no step can be replayed by itself; a program and a "
            "stream that do the same can: give --program MODULE:FUNCTION, where FUNCTION(run) gives them"
        )
    return main.program, main.data


def _check_run(run: Path, record: records.Record, options: argparse.Namespace) -> None:
    """Refuse to write over a run, and to go on with another configuration unless that is allowed."""
    from forgather_fn.checkpoint import latest

    source = Path(options.resume) if isinstance(options.resume, str) else run
    found = latest(run)
    if found is not None and not options.resume:
        raise ConfigError(
            f"{run} holds a run at step {found.step}: --resume goes on with it, --set {OUTPUT}=DIR makes another"
        )
    if not options.resume or not (source / records.NAME).is_file():
        return
    changed = differences(records.read(source).arguments, record.arguments)
    if not changed:
        return
    shown = "\n".join(f"  {path}: {before} -> {after}" for path, before, after in changed)
    if not options.allow_changes:
        raise ConfigError(
            f"the configuration is not the one that {source} was made with:\n{shown}\n"
            "Set it back, or add --allow-changes to go on with the changed one"
        )
    print(lines_of(f"changed since {source} was made:\n{shown}"), flush=True)


def _tell(result: Any) -> None:
    from forgather_fn.fingerprint import fingerprint
    from forgather_fn.state import TrainState

    if isinstance(result, TrainState):
        print(f"step {result.step}\nfingerprint: {fingerprint(result.params)}")
    elif result is not None:
        print(result)


def _tell_versions(record: records.Record) -> None:
    """Say what may make other bits of the same configuration."""
    now = records.surroundings()
    for name in sorted({*now, *record.versions}):
        if record.versions.get(name) != now.get(name):
            was = f"{name} was {record.versions.get(name)}, and is {now.get(name)}"
            print(printable(f"note: {was}: the bits may differ"))


def _free(path: str) -> str:
    """Find a name for a directory that is not there yet."""
    number = 1
    while Path(found := path if number == 1 else f"{path}-{number}").exists():
        number += 1
    return found


def _sweep(options: argparse.Namespace) -> int:
    """Make one run after the other, also after one that failed, whatever by; the exit code is 1 if any did.

    Ctrl-C ends the run that it is pressed in, and all.
    """
    if options.resume and isinstance(options.resume, str):
        raise ConfigError("--resume of a grid goes on with each run that is there: it takes no path")
    failed: list[str] = []
    grid = points(options.grid)
    first = _loaded(options, {**all_settings(options), **grid[0]})
    base = Path(str(first.variables[OUTPUT]))
    for number, point in enumerate(grid, 1):
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items()).replace("/", "_")
        print(f"\n{number}/{len(grid)}  {name}", flush=True)
        try:
            _run(_loaded(options, {**all_settings(options), **point, OUTPUT: str(base / name)}), options)
        except Exception as error:
            is_told = isinstance(error, ValueError | OSError) and not options.debug
            if not isinstance(error, ValueError) and number_in(os.environ, "WORLD_SIZE", 1, least=1) > 1:
                raise  # the other processes are in the middle of this run, and would wait for this one
            failed.append(name)
            message = lines_of(f"forgather: error: {error}") if is_told else traceback.format_exc()
            print(message, file=sys.stderr, flush=True)
    if failed:
        print(f"\n{len(failed)} of {len(grid)} runs failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _launched(options: argparse.Namespace) -> int:
    """Start this command in several processes."""
    from forgather_fn.distributed.cli import launch  # when used: torch's launcher takes a while to load

    processes = options.processes
    if processes < 1:
        raise ConfigError(f"-n {processes}: expected a number of processes, at least 1")
    strategy = arguments(_loaded(options, all_settings(options)).graph).get("main.strategy")
    if strategy == _ONE_PROCESS:
        raise ConfigError(
            f"-n {processes}: this configuration trains in one process; for several, set its strategy:\n"
            "  [distributed_env]\n  .strategy: &strategy !partial:forgather_fn:accelerated []"
        )
    return launch(["forgather_fn", *_without_processes(options.command_line[1:])], processes, module=True)


def _without_processes(arguments: Sequence[str]) -> list[str]:
    """Leave out how many processes there are to be: each of them is one.

    Example:
        >>> _without_processes(["train", "a.yaml", "-n", "2", "--resume"])
        ['train', 'a.yaml', '--resume']
    """
    found: list[str] = []
    skip = False
    for one in arguments:
        if skip:
            skip = False
        elif one in ("-n", "--processes"):
            skip = True
        elif not one.startswith(("-n", "--processes=")):
            found.append(one)
    return found
