"""Draw the pictures of the pages into `docs/pictures/`: `make pictures`.

Each is made of what it shows: the schedules of their functions, the ratios of the table on the page, the runs of the
code on the page.
"""

import contextlib
import io
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch

from forgather_fn import schedules
from forgather_fn.pipeline.schedules import arrange, orders
from forgather_fn.pipeline.simulation import Simulation, simulate
from forgather_fn.reports import read
from website.drawing import Panel, box, drawing, key, text

ROOT: Final = Path(__file__).parent.parent
PICTURES: Final = ROOT / "docs" / "pictures"
TOTAL: Final = 1000

SCHEDULES: Final[Mapping[str, schedules.Schedule]] = {
    "constant": schedules.constant(1.0, warmup=100),
    "linear": schedules.linear(peak=1.0, warmup=100, total=TOTAL),
    "cosine": schedules.cosine(peak=1.0, warmup=100, total=TOTAL),
    "cosine_with_restarts": schedules.cosine_with_restarts(peak=1.0, warmup=100, total=TOTAL, cycles=3),
    "polynomial, power=2": schedules.polynomial(peak=1.0, warmup=100, total=TOTAL, power=2.0),
    "inverse_sqrt": schedules.inverse_sqrt(peak=1.0, warmup=100),
    "warmup_stable_decay": schedules.warmup_stable_decay(peak=1.0, warmup=100, stable=600, decay=300),
    "one_cycle": schedules.one_cycle(peak=1.0, total=TOTAL),
    "piecewise": schedules.piecewise(boundaries=(400, 700), values=(1.0, 0.3, 0.1)),
}


def schedule_curves() -> str:
    """Draw each schedule over a thousand steps."""
    panels = [
        Panel(name, {"a": _corners(schedule)}, {0: "0", 100: "100", 1000: "1000"}, {0: "0", 1: "peak"})
        for name, schedule in SCHEDULES.items()
    ]
    shapes = [
        shape
        for place, panel in enumerate(panels)
        for shape in panel.drawn(44 + place % 3 * 242, 34 + place // 3 * 132, 190, 78)
    ]
    return drawing(760, 34 + (len(panels) + 2) // 3 * 132, "The learning rate of each schedule, by step", shapes)


def _corners(schedule: schedules.Schedule) -> list[tuple[float, float]]:
    """Take every tenth step, and both sides of a jump."""
    coarse = list(range(0, TOTAL, 10))
    jumps = {n for a, b in pairwise(coarse) if abs(schedule(a) - schedule(b)) > 0.12 for n in range(a, b)}
    return [(step, schedule(step)) for step in sorted({*coarse, *jumps, TOTAL - 1})]


def overhead_ratios() -> str:
    """Draw the ratios of the table under *Overhead* in `docs/performance.md`, with data, as bars."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = re.search(r"^## Overhead\n.*?(?P<rows>^\|.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    if table is None:
        raise ValueError("docs/performance.md has no table under '## Overhead'")
    head, _, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in table["rows"].splitlines())
    kept = [row for row in rows if "DataLoader" in row[1] or (row[0] == "forgather_fn" and "sliced" in row[1])]
    return drawing(760, 66 + 22 * len(kept), "Time of a step, against the hand-written loop", _bars(head[2:], kept))


def _bars(models: list[str], rows: list[list[str]]) -> Iterator[str]:
    left, width, gap, scale = 150, 180, 26, 180 / 1.4
    for place, model in enumerate(models):
        x = left + place * (width + gap)
        yield text(x, 24, model, "name")
        for number, (name, _, *cells) in enumerate(rows):
            y, ratio = 40 + number * 22, float(cells[place].split("/")[0])
            if place == 0:
                yield text(left - 10, y + 12, name, "end" + " name" * (name == "forgather_fn"))
            yield box(x, y, ratio * scale, 15, "a" if name == "forgather_fn" else "d")
            yield text(x + max(ratio, 1.0) * scale + 5, y + 12, f"{ratio:.2f}", "small")
        yield f'<path class="axis" d="M{x + scale:.1f} 36V{40 + 22 * len(rows):g}"/>'
        yield text(x + scale, 54 + 22 * len(rows), "1", "small middle")


PIPELINES: Final = (("GPipe", 4), ("1F1B", 4), ("Interleaved1F1B", 8), ("ZBVZeroBubble", 8))
_WORK: Final = {"F": "a", "B": "b", "I": "b", "W": "c"}


def pipeline_schedules() -> str:
    """Draw what four processes do when, in four schedules."""
    runs = {
        name: simulate(
            orders(arrange(name, ranks=4, stages=stages, microbatches=8)), stages, costs=[4 / stages] * stages
        )
        for name, stages in PIPELINES
    }
    longest = max(run.length for run in runs.values())
    shapes = [shape for place, item in enumerate(runs.items()) for shape in _gantt(place, *item, 640 / longest)]
    names = {"a": "forward", "b": "backward, of inputs and weights, or of inputs alone", "c": "backward of weights"}
    shapes += [*key(70, 30, {"a": names["a"]}), *key(170, 30, {"b": names["b"]}), *key(500, 30, {"c": names["c"]})]
    return drawing(760, 50 + 118 * len(runs), "What each of four processes does when, in four schedules", shapes)


def _gantt(place: int, name: str, run: Simulation, scale: float) -> Iterator[str]:
    top = 66 + place * 118
    yield text(70, top, name, "name")
    yield text(710, top, f"waiting {run.bubble:.0%}", "small end")
    for rank, line in enumerate(run.ranks):
        y = top + 8 + rank * 21
        yield text(60, y + 13, f"rank {rank}", "small end")
        yield f'<path class="grid" d="M70 {y + 19:g}h640"/>'
        for work in line:
            x, width = 70 + work.start * scale, (work.stop - work.start) * scale
            yield box(x + 0.5, y, width - 1, 18, _WORK[work.action.work])
            yield text(x + width / 2, y + 12.5, str(work.action.microbatch), "on")


def spike() -> str:
    """Draw the held-out losses of the three runs that `docs/debugging-a-loss-spike.md` makes."""
    names = {"b": "as it was", "a": "batch skipped", "c": "gradient clipped"}
    with executed("debugging-a-loss-spike.md") as runs:
        rows = {
            "b": read(runs / "spike" / "metrics.jsonl"),
            "a": read(runs / "skipped" / "metrics.jsonl"),
            "c": read(runs / "clipped" / "metrics.jsonl"),
        }
    lines = {
        colour: [(row["step"], row["eval_loss"]) for row in read_rows if "eval_loss" in row and row["step"] >= 60]
        for colour, read_rows in rows.items()
    }
    ticks = {0.4: "0.4", 0.5: "0.5", 0.6: "0.6", 0.7: "0.7"}
    panel = Panel("loss on held-out rows", lines, {60: "60", 100: "step 100", 150: "150", 200: "200"}, ticks)
    return drawing(
        760, 300, "The spike, and two ways around it", [*panel.drawn(48, 34, 690, 230), *key(360, 24, names)]
    )


def tutorial() -> str:
    """Take the curve that `docs/tutorial.md` draws."""
    with executed("tutorial.md") as runs:
        return (runs.parent / "curve.svg").read_text(encoding="utf-8")


@contextlib.contextmanager
def executed(page: str) -> Iterator[Path]:
    """Run the Python of a page in an empty directory, and give the directory of its runs."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    main, before = types.ModuleType("__main__"), sys.modules["__main__"]
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        sys.modules["__main__"] = main  # so that what the page defines belongs to a module that is there
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
                    exec(compile(code, page, "exec", dont_inherit=True), vars(main))
            yield Path(directory) / "runs"
        finally:
            sys.modules["__main__"] = before


DRAWN: Final[Mapping[str, Callable[[], str]]] = {
    "schedules.svg": schedule_curves,
    "overhead.svg": overhead_ratios,
    "pipelines.svg": pipeline_schedules,
    "spike.svg": spike,
    "tutorial.svg": tutorial,
}


def main() -> None:
    """Draw all of them."""
    torch.set_num_threads(1)
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
