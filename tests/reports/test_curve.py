"""The picture of the loss: what is in it, and that it is well-formed whatever the numbers."""

import itertools
import math
import re
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.reports.curve import curve
from forgather_fn.reports.jsonl import jsonl
from forgather_fn.reports.row import Row

NAME = "{http://www.w3.org/2000/svg}"
FRAME = {"left": 72.0, "right": 704.0, "top": 48.0, "bottom": 352.0}


def rows(*losses: float, evaluated: dict[int, float] | None = None) -> list[Row]:
    evaluations = evaluated or {}
    return [
        Row(
            step=10 * number,
            samples=0,
            seconds=0.0,
            values={"loss": loss} | ({"eval_loss": evaluations[number]} if number in evaluations else {}),
        )
        for number, loss in enumerate(losses, start=1)
    ]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "loss.svg"


def drawn(path: Path) -> ET.Element:
    return ET.fromstring(path.read_bytes())


def lines(picture: ET.Element, name: str) -> list[list[tuple[float, float]]]:
    """The points of each line and dot of a series, in order; the legend's key left out."""
    shapes = []
    for shape in picture:
        if shape.get("class") != name:
            continue
        if shape.tag == f"{NAME}circle":
            shapes.append([(float(shape.attrib["cx"]), float(shape.attrib["cy"]))])
        else:
            shapes.append([tuple(map(float, point.split(","))) for point in shape.attrib["points"].split()])
    return shapes


def texts(picture: ET.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{NAME}text")]


def test_points_lie_where_their_numbers_say(path):
    curve(rows(4.0, 2.0, 3.0), path, title="loss")
    # From left to right by the step; five per cent of the range are left free above and below.
    top, bottom = FRAME["top"], FRAME["bottom"]
    unit = (bottom - top) / 2.2
    expected = [(72.0, top + 0.1 * unit), (388.0, bottom - 0.1 * unit), (704.0, top + 1.1 * unit)]
    (line,) = lines(drawn(path), "loss")
    assert [x for x, _ in line] == [x for x, _ in expected]
    assert [y for _, y in line] == pytest.approx([y for _, y in expected], abs=0.051)


def test_ticks_stand_at_the_numbers_they_name(path):
    curve(rows(4.0, 2.0, 3.0), path, title="loss")
    picture = drawn(path)
    across = {
        text.text: float(text.attrib["x"])
        for text in picture.iter(f"{NAME}text")
        if text.get("text-anchor") == "middle" and text.text != "step" and "x" in text.attrib
    }
    up = {
        text.text: float(text.attrib["y"]) for text in picture.iter(f"{NAME}text") if text.get("text-anchor") == "end"
    }
    assert list(across) == ["10", "15", "20", "25", "30"]
    assert list(up) == ["2", "2.5", "3", "3.5", "4"]
    (line,) = lines(picture, "loss")
    assert [(across["10"], up["4"]), (across["20"], up["2"]), (across["30"], up["3"])] == line
    axes = [shape.get("d") for shape in picture if shape.get("class") == "axis"]
    assert axes == ["M72 48V352H704"]
    grid = [shape for shape in picture if shape.get("class") == "grid"]
    assert [float(shape.attrib["x1"]) for shape in grid if shape.get("x1") == shape.get("x2")] == list(across.values())
    assert [float(shape.attrib["y1"]) for shape in grid if shape.get("y1") == shape.get("y2")] == list(up.values())


def test_the_evaluation_has_its_own_line_on_the_same_axes(path):
    curve(rows(4.0, 3.0, 2.0, 1.0, evaluated={2: 3.0, 4: 2.0}), path, title="loss")
    picture = drawn(path)
    (train,), (evaluation,) = lines(picture, "loss"), lines(picture, "eval_loss")
    assert evaluation == [train[1], (train[3][0], train[2][1])]
    assert {"train loss", "eval loss"} <= set(texts(picture))
    curve(rows(4.0, 3.0), path, title="loss")
    assert "eval loss" not in texts(drawn(path))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_gaps(path, bad):
    curve(rows(4.0, 3.0, bad, 2.0, bad, bad, 1.0, 2.0), path, title="loss")
    picture = drawn(path)
    assert [len(line) for line in lines(picture, "loss")] == [2, 1, 2]
    dot = picture.find(f"{NAME}circle")
    assert dot is not None
    assert float(dot.attrib["cx"]) == pytest.approx(72 + 632 * 3 / 7, abs=0.05)


@pytest.mark.parametrize("loss", [2.5, 0.0, -3.0, 1e-12, 1e12])
def test_one_point_is_a_dot_in_the_middle(path, loss):
    curve(rows(loss), path, title="loss")
    picture = drawn(path)
    assert lines(picture, "loss") == [[(388.0, 200.0)]]
    assert f"{loss:.6g}" in texts(picture)
    assert [text for text in texts(picture) if text in ("9", "10", "11")] == ["9", "10", "11"]
    assert not any("." in text.text for text in picture.iter(f"{NAME}text") if text.get("y") == "370")


@pytest.mark.parametrize("nothing", [[], rows(math.nan, math.inf), [Row(step=1, samples=1, seconds=1.0, values={})]])
def test_no_points_are_refused(path, nothing):
    with pytest.raises(ValueError, match=r"nothing to draw in '.*loss\.svg': no row has a finite loss or eval_loss"):
        curve(nothing, path, title="loss")
    assert not path.exists()


def test_the_directory_of_the_picture_is_made(tmp_path):
    curve(rows(1.0, 2.0), tmp_path / "a" / "b" / "loss.svg", title="loss")
    assert lines(drawn(tmp_path / "a" / "b" / "loss.svg"), "loss")


def test_a_file_of_rows_gives_the_same_picture_as_the_rows(tmp_path):
    made = rows(4.0, math.nan, 3.3, evaluated={3: 3.5})
    log = jsonl(tmp_path / "log.jsonl")
    for row in made:
        log(row)
    log.close()
    curve(iter(made), tmp_path / "a.svg", title="loss")
    curve(tmp_path / "log.jsonl", tmp_path / "b.svg", title="loss")
    curve(str(tmp_path / "log.jsonl"), tmp_path / "c.svg", title="loss")
    a, b, c = [(tmp_path / name).read_bytes() for name in ("a.svg", "b.svg", "c.svg")]
    assert a == b == c


def test_the_picture_serves_dark_and_light_readers_and_needs_nothing_else(path):
    curve(rows(4.0, 3.0, evaluated={1: 2.0, 2: 1.0}), path, title="loss")
    text = path.read_text()
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for name in (".curve text", ".curve .paper", ".curve .grid", ".curve .loss", ".curve .eval_loss"):
        assert f"{name} {{" in light
        assert f"{name} {{" in dark
    assert "href" not in text
    assert text.count("http") == 1  # the name space


def test_the_title_is_text_whatever_is_in_it(path):
    title = 'a < b & "c" </svg>'
    curve(rows(4.0, 3.0), path, title=title)
    picture = drawn(path)
    assert title in texts(picture)
    named = picture.find(f"{NAME}title")
    assert named is not None
    assert named.text == title


numbers = st.floats(-1e30, 1e30) | st.floats(-10, 10) | st.just(math.nan)


@given(st.lists(numbers, min_size=1).filter(lambda losses: any(map(math.isfinite, losses))))
def test_every_picture_is_well_formed_and_in_its_frame(losses):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "loss.svg")
        curve(rows(*losses), path, title="loss")
        first = path.read_bytes()
        curve(rows(*losses), path, title="loss")
        assert path.read_bytes() == first
        picture = drawn(path)
    points = list(itertools.chain(*lines(picture, "loss")))
    assert len(points) == sum(map(math.isfinite, losses))
    assert all(FRAME["left"] <= x <= FRAME["right"] and FRAME["top"] <= y <= FRAME["bottom"] for x, y in points)
    grid = [shape for shape in picture if shape.get("class") == "grid"]
    assert len(grid) <= 24


def test_a_path_that_cannot_be_used_is_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=f"cannot use '{re.escape(str(tmp_path))}': Is a directory; expected a file that can be"
    ):
        curve(rows(1.0), tmp_path, title="loss")
    with pytest.raises(ValueError, match=r"cannot use '.*none\.jsonl': No such file or directory"):
        curve(tmp_path / "none.jsonl", tmp_path / "loss.svg", title="loss")
