"""The loss curve as a picture."""

import html
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from forgather_fn.reports.jsonl import read
from forgather_fn.reports.path import naming
from forgather_fn.reports.row import Row

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 704, 48, 352
_SERIES = {"loss": "train loss", "eval_loss": "eval loss"}
# The colours are two of Okabe and Ito's, told apart by the colour-blind and on either background.
_STYLE = """\
.curve text { font: 12px system-ui, sans-serif; fill: #222 }
.curve .title { font-size: 15px }
.curve .paper { fill: #fff }
.curve .grid { stroke: #ddd }
.curve .axis { fill: none; stroke: #777 }
.curve .loss { color: #0072b2 }
.curve .eval_loss { color: #d55e00 }
.curve polyline { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linejoin: round }
.curve circle { fill: currentColor }
@media (prefers-color-scheme: dark) {
  .curve text { fill: #ddd }
  .curve .paper { fill: #161616 }
  .curve .grid { stroke: #3a3a3a }
  .curve .loss { color: #56b4e9 }
  .curve .eval_loss { color: #e69f00 }
}"""


def curve(source: str | os.PathLike[str] | Iterable[Row], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw the loss, and the evaluation loss where there is one, against the step, as an SVG file.

    The file needs nothing beside it, follows the reader's preference for light or dark colours, and its text depends on
    the arguments only. A value that is not finite, or beyond 1e300, leaves a gap.

    Args:
        source: Rows, or the path of a file that :func:`~forgather_fn.reports.jsonl.jsonl` wrote.
        path: The file to write; its parent directories are created.
        title: Printed above the curve.

    Raises:
        ValueError: No row has a finite loss; or a path cannot be used.
    """
    series = _series(source)
    known = [point for points in series.values() for point in points if _is_drawn(point[1])]
    if not known:
        raise ValueError(f"there is nothing to draw in {os.fspath(path)!r}: no row has a finite loss or eval_loss")
    steps, losses = zip(*known, strict=True)
    across = _Axis.over(steps, _LEFT, _RIGHT, margin=0.0, grain=1.0)
    up = _Axis.over(losses, _BOTTOM, _TOP, margin=0.05, grain=0.0)
    label = html.escape(title)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="curve" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        f"<title>{label}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="24">{label}</text>',
        *_frame(across, up),
        *_legend(series),
        *(shape for name, points in series.items() for shape in _shapes(name, points, across, up)),
        "</svg>",
    ]
    with naming(path, "a file that can be written"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


@attrs.frozen
class _Axis:
    """A linear map from values to the picture's units."""

    low: float
    high: float
    start: int
    end: int
    grain: float  # ticks are not closer than this

    @classmethod
    def over(cls, values: Sequence[float], start: int, end: int, *, margin: float, grain: float) -> "_Axis":
        low, high = min(values), max(values)
        tiny = 1e-300  # below, a picture's numbers would not differ any more
        room = (high - low) * margin if high - low > tiny else abs(low) * 0.1 if abs(low) > tiny else 1.0
        return cls(low - room, high + room, start, end, grain)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """About five round values, with enough digits to tell them apart."""
        rough = max((self.high - self.low) / 5, self.grain)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        values = [count * step for count in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        digits = math.ceil(math.log10(max(map(abs, values)) / step)) + 1 if any(values) else 1
        return [(value, f"{value:.{max(digits, 6)}g}") for value in values]


def _series(source: str | os.PathLike[str] | Iterable[Row]) -> Mapping[str, list[tuple[float, float]]]:
    if isinstance(source, str | os.PathLike):
        rows = [(record["step"], record) for record in read(source)]
    else:
        rows = [(float(row.step), dict(row.values)) for row in source]
    series = {name: [(step, values[name]) for step, values in rows if name in values] for name in _SERIES}
    return {name: points for name, points in series.items() if points}


def _is_drawn(value: float) -> bool:
    """Tell whether there is room for a value: beyond, not even the distance of two of them is a number."""
    return abs(value) < 1e300


def _frame(across: _Axis, up: _Axis) -> Iterator[str]:
    for value, text in across.ticks():
        x = f"{across.at(value):.1f}"
        yield f'<line class="grid" x1="{x}" y1="{_TOP}" x2="{x}" y2="{_BOTTOM}"/>'
        yield f'<text x="{x}" y="{_BOTTOM + 18}" text-anchor="middle">{text}</text>'
    for value, text in up.ticks():
        y = f"{up.at(value):.1f}"
        yield f'<line class="grid" x1="{_LEFT}" y1="{y}" x2="{_RIGHT}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{text}</text>'
    yield f'<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>'
    yield f'<text x="{(_LEFT + _RIGHT) // 2}" y="{_HEIGHT - 10}" text-anchor="middle">step</text>'
    yield f'<text transform="translate(16 {(_TOP + _BOTTOM) // 2}) rotate(-90)" text-anchor="middle">loss</text>'


def _legend(names: Iterable[str]) -> Iterator[str]:
    for place, name in enumerate(names):
        x = _RIGHT - 190 + 100 * place
        yield f'<polyline class="{name} key" points="{x},36 {x + 20},36"/>'
        yield f'<text x="{x + 26}" y="40">{_SERIES[name]}</text>'


def _shapes(name: str, points: Iterable[tuple[float, float]], across: _Axis, up: _Axis) -> Iterator[str]:
    """Lines between gaps; a dot for a value between two gaps, which a line would not show."""
    for drawn, group in itertools.groupby(points, key=lambda point: _is_drawn(point[1])):
        if not drawn:
            continue
        places = [f"{across.at(step):.1f},{up.at(value):.1f}" for step, value in group]
        if len(places) > 1:
            yield f'<polyline class="{name}" points="{" ".join(places)}"/>'
        else:
            x, y = places[0].split(",")
            yield f'<circle class="{name}" cx="{x}" cy="{y}" r="2.5"/>'
