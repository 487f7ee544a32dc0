"""The picture of runs: what is in it, the same bytes each time, and what cannot be drawn."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from forgather_fn.cli import main
from forgather_fn.reports import jsonl, plot
from forgather_fn.reports.picture import Line, _apart
from forgather_fn.reports.row import Row

pytest.importorskip("matplotlib")


def written(directory: Path, *, offset: float = 0.0, steps: int = 20, **functions) -> Path:
    """A run whose metrics are functions of the step."""
    write = jsonl(directory / "metrics.jsonl")
    for step in range(1, steps + 1):
        values = {"loss": offset + 2 + 3 / step, "learning_rate": 1e-3 / step, "grad_norm": 1 + 1 / step}
        values |= {"eval_loss": offset + 2.5 + 3 / step} if step % 5 == 0 else {}
        values |= {name: function(step) for name, function in functions.items()}
        values = {name: value for name, value in values.items() if value is not None}
        write(Row(step=step, samples=step, seconds=1.0, values=values))
    write.close()
    return directory


def texts(path: Path) -> list[str]:
    return ["".join(node.itertext()) for node in ET.parse(path).iter() if node.tag.endswith("}text")]


def lines(path: Path) -> int:
    """Coloured lines: those that are neither axes, nor ticks, nor the grid."""
    text = path.read_text()
    return sum(f"stroke: {colour}" in style for style in text.split("<path") for colour in ("#0072b2", "#d55e00"))


def test_runs_are_compared_by_their_names(tmp_path):
    runs = [written(tmp_path / "slow"), written(tmp_path / "fast", offset=1.0)]
    plot(runs, tmp_path / "new" / "both.svg")
    shown = texts(tmp_path / "new" / "both.svg")
    assert {"slow", "fast", "Learning rate", "Gradient norm", "step"} <= set(shown)
    assert any(text.startswith("Loss  (lines: training; dots: evaluation)") for text in shown)
    # A loss, evaluations, a rate and a norm for each run.
    assert lines(tmp_path / "new" / "both.svg") >= 8


def test_one_run_has_its_two_losses_labelled(tmp_path):
    plot([written(tmp_path / "a")], tmp_path / "a.svg")
    assert {"training", "evaluation", "Loss"} <= set(texts(tmp_path / "a.svg"))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("options", [{}, {"log": True, "smooth": 5}])
def test_the_same_rows_give_the_same_bytes(tmp_path, suffix, options, monkeypatch):
    import matplotlib as mpl

    run = written(tmp_path / "a")
    plot([run], tmp_path / f"one{suffix}", **options)
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "red")
    plot([run], tmp_path / f"two{suffix}", **options)
    assert mpl.rcParams["axes.facecolor"] == "red"
    content = (tmp_path / f"one{suffix}").read_bytes()
    assert content == (tmp_path / f"two{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


@pytest.mark.parametrize(
    "functions",
    [
        {"loss": lambda step: math.nan if step == 7 else 1.0},
        {"loss": lambda step: math.inf if step > 3 else 1.0, "eval_loss": lambda step: None},
        {"loss": lambda step: -1.0, "grad_norm": lambda step: 0.0},
        {"learning_rate": lambda step: None, "grad_norm": lambda step: None},
        {"loss": lambda step: None},
        {"loss": lambda step: 1e30 * step},
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_whatever_the_numbers(tmp_path, functions, log):
    runs = [written(tmp_path / "a", **functions), written(tmp_path / "b", steps=1, **functions)]
    for chosen in (runs[:1], runs):
        plot(chosen, tmp_path / "a.svg", log=log, smooth=3)
        assert texts(tmp_path / "a.svg")


def test_many_runs_are_told_apart(tmp_path):
    runs = [written(tmp_path / f"run{i}", offset=i / 10, steps=5) for i in range(9)]
    plot(runs, tmp_path / "all.svg")
    assert {f"run{i}" for i in range(9)} <= set(texts(tmp_path / "all.svg"))


def test_labels_are_moved_apart_in_their_order_and_stay_within():
    for heights in ([0.5, 0.5, 0.5], [0.99, 1.0, 0.98], [0.0, 0.01, 0.9], [0.2, 0.8], []):
        placed = _apart(heights, 0.1)
        order = sorted(range(len(heights)), key=heights.__getitem__)
        found = [placed[number] for number in order]
        assert all(after - before >= 0.1 - 1e-12 for before, after in itertools.pairwise(found))
        assert all(0.0 <= height <= 1.0 for height in placed)
    assert _apart([0.2, 0.8], 0.1) == [0.2, 0.8]


def test_means_are_around_each_row_and_gaps_stay():
    line = Line([1, 2, 3, 4, 5, 6], [1.0, 2.0, 6.0, math.nan, 4.0, 8.0])
    assert line.smoothed(1).values == pytest.approx(line.values, nan_ok=True)
    assert line.smoothed(3).values == pytest.approx([1.0, 3.0, 4.0, math.nan, 6.0, 8.0], nan_ok=True)


def test_runs_of_one_name_are_named_by_more_of_their_paths(tmp_path):
    plot([written(tmp_path / "a" / "run"), written(tmp_path / "b" / "run")], tmp_path / "a.svg")
    assert {"a/run", "b/run"} <= set(texts(tmp_path / "a.svg"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a -o a.pdf", r"'a.pdf' must end in .png or .svg"),
        ("none", r"'none' does not exist: expected a run directory with a metrics.jsonl, or such a file, as ff.report"),
        ("empty", r"'empty/metrics.jsonl' does not exist"),
        ("a a", "a run is given twice: a, a"),
        ("a --smooth 0", "smooth=0 is a number of rows, of at least 1"),
        ("bare", "nothing to draw: no row of bare has a finite loss"),
        ("a -o a/metrics.jsonl/x.png", "expected a file that can be written"),
    ],
)
def test_what_cannot_be_drawn_is_told(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    written(Path("a"))
    written(Path("bare"), loss=lambda step: math.nan, eval_loss=lambda step: None)
    Path("empty").mkdir()
    assert main(["plot", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_command_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(written(Path("a"))), "--log", "-o", "x/a.png"]) == 0
    assert capsys.readouterr().out == "x/a.png\n"
    assert Path("x/a.png").stat().st_size > 1000


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot([written(tmp_path / "a")], tmp_path / "a.png")


def test_no_screen_is_needed_and_no_backend_chosen(tmp_path):
    script = (
        "import sys; from forgather_fn.reports import plot; plot(sys.argv[1:2], sys.argv[2]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    run = str(written(tmp_path / "a"))
    done = subprocess.run([sys.executable, "-c", script, run, str(tmp_path / "a.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
