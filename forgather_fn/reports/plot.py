"""Runs as a picture: their rows, and the file that is written."""

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from forgather_fn.reports.jsonl import read
from forgather_fn.reports.path import checked, naming
from forgather_fn.reports.picture import Line, Run, save

StrPath = str | os.PathLike[str]

METRICS: Final = "metrics.jsonl"
"""The file of a run's directory that its rows are read from."""

_FORMATS: Final[Mapping[str, Mapping[str, Any]]] = {
    ".png": {"format": "png", "dpi": 160, "metadata": {"Software": None}},
    ".svg": {"format": "svg", "metadata": {"Date": None}},
}


def plot(runs: Iterable[StrPath], path: StrPath, *, log: bool = False, smooth: int = 1) -> None:
    """Draw the loss of runs against the step, and beside it what else their rows have: learning rate, gradient norm.

    Training losses are lines, evaluation losses are dots. Nothing is shown on a screen, and matplotlib's settings are
    neither used nor changed. The file depends on the rows, the arguments and matplotlib's version alone.

    Args:
        runs: Directories with a ``metrics.jsonl`` (:func:`~forgather_fn.reports.jsonl.jsonl`), or such files.
        path: The file to write, ``.png`` or ``.svg``; its parent directories are created.
        log: Draw losses and norms on a logarithmic scale.
        smooth: Draw means of so many rows around each, the rows of the loss faintly behind them; the learning rate and
            evaluations are drawn as they are.

    Raises:
        ValueError: matplotlib is not installed; a run cannot be read, or none has a finite loss; the file's suffix is
            another; ``smooth`` is less than 1.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot: matplotlib is not installed: pip install matplotlib")
    options = _FORMATS.get(Path(checked(path, "plot")).suffix.lower())
    if options is None:
        raise ValueError(f"plot: {os.fspath(path)!r} must end in {' or '.join(_FORMATS)}, which says what is written")
    if type(smooth) is not int or smooth < 1:
        raise ValueError(f"plot: smooth={smooth!r} is a number of rows, of at least 1")
    if type(log) is not bool:
        raise ValueError(f"plot: log={log!r}: expected True or False")
    if isinstance(runs, str | bytes | Mapping) or not isinstance(runs, Iterable):
        raise ValueError(f"plot: runs={runs!r}: expected paths of runs: [path, ...]")
    found = [
        Run(name, _lines(file), smooth) for name, file in _named([Path(checked(run, "plot")) for run in runs]).items()
    ]
    if not any(run.lines.keys() & {"loss", "eval_loss"} for run in found):
        names = ", ".join(run.name for run in found)
        raise ValueError(f"plot: there is nothing to draw: no row of {names} has a finite loss")
    with naming(path, "a file that can be written"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save(found, path, options, log=log)


def _named(runs: Sequence[Path]) -> dict[str, Path]:
    """Find the files, and name each run by the end of its path that no other has.

    Raises:
        ValueError: There is none; one is given twice.
    """
    files = [run / METRICS if run.is_dir() else run for run in runs]
    if not files:
        raise ValueError("plot: there is no run to draw")
    homes = [(file.parent if file.name == METRICS else file.with_suffix("")).resolve() for file in files]
    if len(set(homes)) < len(homes):
        raise ValueError(f"plot: a run is given twice: {', '.join(map(str, runs))}")
    depth = 1
    while len({home.parts[-depth:] for home in homes}) < len(homes):
        depth += 1
    return {"/".join(home.parts[-depth:]): file for home, file in zip(homes, files, strict=True)}


def _lines(file: Path) -> dict[str, Line]:
    """Read the metrics of a run that have a finite value; what is not finite leaves a gap."""
    if not file.exists():
        raise ValueError(
            f"plot: {os.fspath(file)!r} does not exist: expected a run directory with a {METRICS}, or such a file, as "
            f"ff.report(jsonl(RUN/{METRICS})) writes it"
        )
    rows = read(file)
    points = {
        metric: [(row["step"], row[metric]) for row in rows if metric in row]
        for metric in ("loss", "eval_loss", "learning_rate", "grad_norm")
    }
    return {
        metric: Line([step for step, _ in own], [y if math.isfinite(y) else math.nan for _, y in own])
        for metric, own in points.items()
        if any(math.isfinite(y) for _, y in own)
    }
