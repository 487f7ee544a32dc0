"""The pictures in `docs/pictures/` are those that would be drawn now."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from website import pictures
from website.drawing import Panel

RUN = {"spike.svg", "tutorial.svg"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def committed(name: str) -> str:
    return (pictures.PICTURES / name).read_text(encoding="utf-8")


def test_each_picture_is_drawn_and_nothing_else_lies_there() -> None:
    assert sorted(pictures.DRAWN) == sorted(path.name for path in pictures.PICTURES.iterdir())


@pytest.mark.parametrize("name", sorted(set(pictures.DRAWN) - RUN))
def test_picture_is_up_to_date(name: str) -> None:
    assert pictures.DRAWN[name]() == committed(name), "it has changed: make pictures"


@pytest.mark.parametrize("name", sorted(RUN))
def test_picture_of_a_run_is_up_to_date(name: str) -> None:
    # Another kind of processor rounds differently, and a run wanders off: by less than can be seen.
    now, before = pictures.DRAWN[name](), committed(name)
    assert NUMBER.sub("N", now) == NUMBER.sub("N", before), "it has changed: make pictures"
    pairs = zip(NUMBER.findall(now), NUMBER.findall(before), strict=True)
    assert max(abs(float(one) - float(other)) for one, other in pairs) < 20, "it has changed: make pictures"


@pytest.mark.parametrize("draw", [pictures.schedule_curves, pictures.pipeline_schedules])
def test_drawing_again_gives_the_same_text(draw: Callable[[], str]) -> None:
    assert draw() == draw()


def test_points_lie_between_the_ends_of_the_axes() -> None:
    panel = Panel("<one>", {"a": [(0, 0), (5, 1), (10, 99)]}, {0: "0", 10: "10"}, {0: "0", 2: "2"})
    text = "\n".join(panel.drawn(left=100, top=10, width=50, height=40))
    assert 'points="100.0,50.0 125.0,30.0 150.0,10.0"' in text  # what is beyond the top is drawn at the top
    assert "&lt;one&gt;" in text


def test_missing_table_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text("# Performance\n")
    with pytest.raises(ValueError, match="no table under '## Overhead'"):
        pictures.overhead_ratios()
