"""Pictures as SVG: text that depends on the arguments alone, in colours for light and dark pages."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs

Point = tuple[float, float]

# Okabe and Ito's colours, told apart by the colour-blind; lighter ones on dark pages.
_STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #222 }
.small { font-size: 11px; fill: #666 }
.name { font-weight: 600 }
.end { text-anchor: end }
.middle { text-anchor: middle }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round }
.axis { fill: none; stroke: #8a949e }
.grid { fill: none; stroke: #8a949e; stroke-opacity: 0.3 }
.fill { fill: currentColor }
.on { fill: #fff; font-size: 9px; text-anchor: middle }
.a { color: #0072b2 } .b { color: #d55e00 } .c { color: #009e73 } .d { color: #8a949e }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd }
  .small { fill: #aaa }
  .on { fill: #111 }
  .a { color: #56b4e9 } .b { color: #e69f00 } .c { color: #2ec4a0 }
}"""


@attrs.frozen
class Panel:
    """A frame with lines in it.

    Attributes:
        title: Above it.
        lines: Points by the class of their colour.
        across: Labelled places on the axis below; the first and the last are its ends.
        up: The same of the axis on the left.
    """

    title: str
    lines: Mapping[str, Sequence[Point]]
    across: Mapping[float, str]
    up: Mapping[float, str]

    def drawn(self, left: float, top: float, width: float, height: float) -> Iterator[str]:
        """Draw it into a rectangle; labels stand outside."""

        def place(point: Point) -> Point:
            (low, high), (bottom, ceiling) = _ends(self.across), _ends(self.up)
            x = left + (point[0] - low) / (high - low) * width
            return x, top + height - (min(point[1], ceiling) - bottom) / (ceiling - bottom) * height

        yield text(left, top - 10, self.title, "name")
        for value, label in self.up.items():
            y = place((_ends(self.across)[0], value))[1]
            yield f'<path class="grid" d="M{left:g} {y:.1f}h{width:g}"/>'
            yield text(left - 6, y + 4, label, "small end")
        for value, label in self.across.items():
            yield text(place((value, 0.0))[0], top + height + 15, label, "small middle")
        yield f'<path class="axis" d="M{left:g} {top:g}v{height:g}h{width:g}"/>'
        for colour, points in self.lines.items():
            places = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
            yield f'<polyline class="line {colour}" points="{places}"/>'


def _ends(ticks: Iterable[float]) -> Point:
    values = sorted(ticks)
    return values[0], values[-1]


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Write words at a place."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Fill a rectangle."""
    return f'<rect class="fill {kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5"/>'


def key(x: float, y: float, names: Mapping[str, str], step: float = 120) -> Iterator[str]:
    """Say which colour is what, side by side."""
    for place, (colour, name) in enumerate(names.items()):
        yield box(x + place * step, y - 9, 14, 10, colour)
        yield text(x + place * step + 20, y, name, "small")


def drawing(width: int, height: int, title: str, shapes: Iterable[str]) -> str:
    """Put shapes together as a file."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height}">'
    return "\n".join(
        [head, f"<title>{html.escape(title)}</title>", f"<style>\n{_STYLE}\n</style>", *shapes, "</svg>\n"]
    )
