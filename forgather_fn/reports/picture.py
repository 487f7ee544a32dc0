"""The picture of runs, by matplotlib: one large panel of losses, and small ones beside it."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; the yellow is left out, since it is not seen on white.
_COLOURS: Final = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555"
_DASHES: Final = "solid", (0, (4, 1.5)), (0, (1, 1.2))
_INK: Final = "#333333"
_STYLE: Final[Any] = {  # matplotlib lists all names that there are in the type of its settings
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#777777",
    "ytick.color": "#777777",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.solid_joinstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "forgather",
}


_BESIDE: Final = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm"}


@attrs.frozen
class Line:
    """The points of one metric; what is not finite is nan, and leaves a gap."""

    steps: list[float]
    values: list[float]

    def smoothed(self, points: int) -> "Line":
        """Take means over windows of so many points around each, fewer towards the ends; gaps stay gaps."""
        values = []
        for place, value in enumerate(self.values):
            reach = min((points - 1) // 2, place, len(self.values) - 1 - place)
            window = [v for v in self.values[place - reach : place + reach + 1] if not math.isnan(v)]
            values.append(math.nan if math.isnan(value) else math.fsum(window) / len(window))
        return Line(self.steps, values)

    @property
    def last(self) -> float:
        """The last value that is one."""
        return next(value for value in reversed(self.values) if not math.isnan(value))


@attrs.frozen
class Run:
    """What is drawn of one run.

    Attributes:
        name: As it is labelled.
        lines: Its metrics, by name; each has a finite value.
        smooth: Over how many points means are taken.
    """

    name: str
    lines: Mapping[str, Line]
    smooth: int = 1


def save(runs: Sequence[Run], path: str | os.PathLike[str], options: Mapping[str, Any], *, log: bool) -> None:
    """Draw runs into a file, in a style of its own, whatever matplotlib is configured to.

    Args:
        runs: One of them has ``loss`` or ``eval_loss``.
        path: The file.
        options: Of ``Figure.savefig``.
        log: Draw losses and norms on a logarithmic scale.
    """
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        _drawn(runs, log).savefig(os.fspath(path), **options)


def _drawn(runs: Sequence[Run], log: bool) -> "Figure":
    from matplotlib.figure import Figure

    beside = [metric for metric in _BESIDE if any(metric in run.lines for run in runs)]
    figure = Figure(figsize=(9.6 if beside else 6.4, 4.2), layout="constrained")
    grid = figure.add_gridspec(max(len(beside), 1), 1 + bool(beside), width_ratios=[1.9, 1] if beside else [1])
    losses = figure.add_subplot(grid[:, 0])
    _losses(losses, runs)
    for number, metric in enumerate(beside):
        axes = figure.add_subplot(grid[number, 1], sharex=losses)
        _small(axes, runs, metric)
        axes.tick_params(labelbottom=number == len(beside) - 1)
        if log and metric == "grad_norm":
            _logarithmic(axes)
    if log:
        _logarithmic(losses)
    for axes in figure.axes:
        axes.margins(x=0.01)
        if axes.xaxis.get_tick_params().get("labelbottom", True):
            axes.set_xlabel("step")
    _label(figure, losses, _ends(runs))
    return figure


def _look(number: int) -> dict[str, Any]:
    """Give the colour of a run, and another dash where colours begin again."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    }


def _losses(axes: "Axes", runs: Sequence[Run]) -> None:
    """Draw training losses as lines and evaluation losses as dots; rows that are smoothed stay, faintly."""
    title = "Loss"
    if any({"loss", "eval_loss"} <= run.lines.keys() for run in runs):
        title += "  (lines: training; dots: evaluation)" if len(runs) > 1 else ""
    axes.set_title(title)
    for number, run in enumerate(runs):
        look = _look(number)
        if line := run.lines.get("loss"):
            if run.smooth > 1:
                axes.plot(line.steps, line.values, color=look["color"], alpha=0.22, linewidth=0.8, zorder=2)
                line = line.smoothed(run.smooth)
            marker = "." if len(line.steps) == 1 else None
            axes.plot(line.steps, line.values, **look, linewidth=1.4, marker=marker, zorder=3)
        if line := run.lines.get("eval_loss"):
            look = _look(number if len(runs) > 1 else 1)
            dots: dict[str, Any] = {
                "marker": "o",
                "markersize": 4.5,
                "markeredgecolor": "white",
                "markeredgewidth": 0.8,
            }
            joined: dict[str, Any] = (
                {**look, "linestyle": ":", "linewidth": 1.0} if "loss" in run.lines else {**look, "linewidth": 1.4}
            )
            axes.plot(line.steps, line.values, **joined, **dots, zorder=4)


def _small(axes: "Axes", runs: Sequence[Run], metric: str) -> None:
    axes.set_title(_BESIDE[metric])
    for number, run in enumerate(runs):
        if line := run.lines.get(metric):
            values = line.smoothed(run.smooth).values if metric == "grad_norm" else line.values
            axes.plot(line.steps, values, **_look(number), linewidth=1.2)
    if metric == "learning_rate":
        axes.set_ylim(bottom=0.0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)


def _logarithmic(axes: "Axes") -> None:
    """Use a logarithmic scale, where there is a value for it; label ticks within a decade where it is the only one."""
    from matplotlib.ticker import LogFormatter

    if not any(value > 0 for line in axes.get_lines() for value in np.asarray(line.get_ydata())):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    axes.grid(which="minor", axis="y", linewidth=0.4, alpha=0.0 if high / low > 100 else 1.0)


def _ends(runs: Sequence[Run]) -> list[tuple[str, str, float]]:
    """Give text, colour and height of the labels: of the lines of one run, or of the runs."""
    if len(runs) == 1:
        kinds = {"loss": "training", "eval_loss": "evaluation"}
        (run,) = runs
        shown = zip(kinds.items(), _COLOURS, strict=False)
        return [(text, colour, _last(run, metric)) for (metric, text), colour in shown if metric in run.lines]
    return [
        (run.name, _look(number)["color"], _last(run, metric))
        for number, run in enumerate(runs)
        if (metric := "loss" if "loss" in run.lines else "eval_loss") in run.lines
    ]


def _last(run: Run, metric: str) -> float:
    line = run.lines[metric]
    return (line.smoothed(run.smooth) if metric == "loss" else line).last


def _label(figure: "Figure", axes: "Axes", ends: Sequence[tuple[str, str, float]]) -> None:
    """Write labels at the right border, at the height of what they name, moved so that none covers another."""
    low, high = axes.transData.inverted().transform(axes.transAxes.transform([(0, 0), (0, 1)]))[:, 1]
    scale = axes.yaxis.get_transform().transform
    bottom, top = scale([low, high])
    heights = [float((scale([value])[0] - bottom) / (top - bottom)) for _, _, value in ends]
    gap = 12.0 / (axes.get_position().height * figure.get_figheight() * 72)
    for (text, colour, _), height in zip(ends, _apart(heights, gap), strict=True):
        axes.annotate(
            text, (1.0, height), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points",
            color=colour, va="center", fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart, as little as can be from the lowest up, and back down where they leave the panel."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed: list[float] = []
    for number in order:
        height = min(max(heights[number], 0.0), 1.0)
        placed.append(max(height, placed[-1] + gap) if placed else height)
    limit = 1.0
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], limit)
        limit = placed[place] - gap
    found = dict(zip(order, placed, strict=True))
    return [found[number] for number in range(len(heights))]
