"""``forgather checkpoint list | verify | show`` and ``forgather replay``."""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forgather_fn.checkpoint.catalog import Entry, added, list_checkpoints, verify
from forgather_fn.checkpoint.manifest import CheckpointError
from forgather_fn.importing import import_named
from forgather_fn.terminal import instant, ordinal, printable

if TYPE_CHECKING:
    from forgather_fn.checkpoint.replaying import Replay
    from forgather_fn.data import Stream
    from forgather_fn.program import Program


_RECORDED: Final = "record.json"
_MAKERS: Final = {
    _RECORDED: "forgather_fn.config.commands.train:rebuilt",
    "run.json": "forgather_fn.demo.train:rebuilt",
}
"""What makes the program and the stream of a run again, by a file that it has."""


def command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the actions to a parser, and give what runs one."""
    actions = {"list": _list, "verify": _verify, "show": _show}
    parser.add_argument("action", choices=actions, help="what to do with the checkpoints")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or one checkpoint of it")
    parser.epilog = "example: forgather checkpoint verify runs/demo"

    def execute(options: argparse.Namespace) -> int:
        return actions[options.action](_entries(options.run))

    return execute


def _entries(path: Path) -> list[Entry]:
    found = [entry for entry in list_checkpoints(path.parent) if entry.path == path] or list_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} has no checkpoints: expected a run directory, or a checkpoint-<step> in one")
    return found


def _list(entries: list[Entry]) -> int:
    print(f"{'step':>10} {'samples':>12} {'committed':19} {'size':>9}  state")
    for entry in entries:
        manifest = entry.manifest
        samples = manifest.samples if manifest else "?"
        when = instant(manifest.time) if manifest else "?"
        size = sum(file.size for file in manifest.files.values()) / 1e6 if manifest else 0.0
        results = " ".join(f"{name}={value:.6g}" for name, value in manifest.metrics.items()) if manifest else ""
        state = "; ".join(entry.faults) or ("pinned" if manifest and manifest.pinned else "whole")
        print(printable(f"{entry.step:>10} {samples:>12} {when:19} {size:>7.1f}MB  {state} {results}".rstrip()))
    return 0


def _verify(entries: list[Entry]) -> int:
    """Read every byte; the exit code is 1 if anything is wrong."""
    wrong = 0
    for entry in entries:
        faults = verify(entry.path) if entry.manifest or entry.faults else []
        wrong += bool(faults)
        others = f" (files that are not its own: {', '.join(added(entry))})" if entry.manifest and added(entry) else ""
        print(printable(f"{entry.path.name}: {'; '.join(faults) or 'whole'}{others}"))
    return 1 if wrong else 0


def _show(entries: list[Entry]) -> int:
    """Print what the newest whole one says of itself."""
    from forgather_fn.checkpoint import state_file  # when used, as torch is everywhere in this module

    whole = [entry for entry in entries if entry.whole and entry.manifest]
    if not whole:
        raise CheckpointError(f"{entries[-1].path}: {'; '.join(entries[-1].faults)}")
    entry = whole[-1]
    record = state_file.read(entry.path)
    print(printable(str(entry.path)))
    for name in ("step", "samples", "seed", "data", "batch_size", "stream"):
        print(printable(f"  {name}: {record.get(name)}"))
    for group in ("counters", "plan", "versions", "metrics"):
        print(f"  {group}:")
        held = record.get(group)
        for name, value in held.items() if isinstance(held, dict) else ():
            print(printable(f"    {name}: {value}"))
    assert entry.manifest is not None
    for name, file in entry.manifest.files.items():
        print(f"  {name}: {file.size:,} bytes, sha256 {file.sha256}")
    return 0


def replay_command(parser: argparse.ArgumentParser, /) -> Callable[[argparse.Namespace], int]:
    """Add the arguments of ``forgather replay`` to a parser, and give what runs it."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument(
        "--step",
        type=int,
        required=True,
        metavar="N",
        help='the step: 0 is the first; step 60 is the 61st, reported in row "step": 61 of metrics.jsonl',
    )
    parser.add_argument(
        "--program",
        metavar="MODULE:FUNCTION",
        help="a function of the run directory that gives (program, stream); known for runs of forgather demo and train",
    )
    parser.add_argument(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="what the configuration of a run of forgather train may build, as it was allowed there",
    )
    parser.epilog = "example: forgather replay runs/demo --step 400"

    def execute(options: argparse.Namespace) -> int:
        from forgather_fn.checkpoint.replaying import replay

        program, data = _maker(options.run, options.program, options.allow)(options.run)
        newest = max((entry.step for entry in list_checkpoints(options.run) if entry.whole), default=0)
        if options.step > newest:
            print(f"after the newest checkpoint: {options.step - newest:,} steps are executed first", file=sys.stderr)
        _tell(replay(program, options.run, data, step=options.step))
        return 0

    return execute


def _maker(run: Path, named: str | None, allow: Sequence[str]) -> "Callable[[Path], tuple[Program, Stream]]":
    """Find what makes the program and the stream of a run again: what was named, or what has made it."""
    found = next((name for name in _MAKERS if (run / name).is_file()), None)
    if allow and (named or found != _RECORDED):
        raise ValueError(f"--allow {' '.join(allow)}: {run} is not made again from the record of forgather train")
    if named:
        return _target(named)
    if found is None:
        raise ValueError(
            f"{run} is no run of forgather train or demo, which write {' or '.join(_MAKERS)}: give --program "
            "MODULE:FUNCTION, where FUNCTION(run) gives (program, stream)"
        )
    maker: Callable[..., tuple[Program, Stream]] = _target(_MAKERS[found])
    return functools.partial(maker, allow=allow) if found == _RECORDED else maker


def _target(name: str) -> "Callable[[Path], tuple[Program, Stream]]":
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(import_named(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--program {name}: expected MODULE:FUNCTION that can be imported; {error}") from None
    target: Callable[[Path], tuple[Program, Stream]] = found
    return target


def _tell(result: "Replay") -> None:
    origin = result.restored.name if result.restored else "the beginning"
    after = result.step + 1
    where = f'the {ordinal(after)}: it is reported in row "step": {after} of metrics.jsonl'
    print(f"step {result.step} ({where}), from {origin}")
    for name, value in result.metrics.items():
        if not name.startswith("grad_norm/"):
            print(f"  {name}: {value!r}")
    print("  gradient norms, largest first:")
    norms = {name: value for name, value in result.metrics.items() if name.startswith("grad_norm/")}
    for name, value in sorted(norms.items(), key=lambda item: -item[1]):
        print(f"    {value:12.6g}  {name.removeprefix('grad_norm/')}")
    if result.indices is not None:
        print(f"  samples: {' '.join(map(str, result.indices))}")
