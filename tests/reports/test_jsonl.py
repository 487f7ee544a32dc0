"""Lines of JSON: what is written, what a resumed run leaves of it, and what a kill can do to it."""

import json
import math
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.reports.jsonl import jsonl, read
from forgather_fn.reports.row import Row


def row(step: int, *, started: int = 0, **values: float) -> Row:
    return Row(step=step, samples=32 * step, epoch=step / 8, started=started, seconds=0.5, values=values)


def write(path: Path, *rows: Row) -> None:
    log = jsonl(path)
    for each in rows:
        log(each)
    log.close()


def steps(path: Path) -> list[float]:
    return [record["step"] for record in read(path)]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "log.jsonl"


def test_a_line_is_an_object_of_the_fields_and_the_values(path):
    write(path, row(2, loss=2.5, learning_rate=1e-4))
    assert path.read_text() == (
        '{"step": 2, "samples": 64, "epoch": 0.25, "seconds": 0.5, "loss": 2.5, "learning_rate": 0.0001}\n'
    )


def test_an_epoch_that_is_not_known_is_left_out(path):
    write(path, Row(step=1, samples=1, seconds=0.5, values={}))
    assert read(path) == [{"step": 1, "samples": 1, "seconds": 0.5}]


names = st.text(min_size=1).filter(lambda name: name not in ("step", "samples", "epoch", "started", "horizon"))


@given(st.dictionaries(names.filter(lambda name: name not in ("seconds", "values")), st.floats()))
def test_strict_parsers_read_it_and_the_same_floats_come_back(values):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "log.jsonl")
        write(path, row(1, **values))
        json.loads(path.read_bytes().decode("ascii"), parse_constant=refuse)
        (record,) = read(path)
    back = {name: record[name] for name in values}
    assert {name: value.hex() for name, value in back.items()} == {name: value.hex() for name, value in values.items()}


def test_each_line_is_there_at_once(path):
    log = jsonl(path)
    for step in (1, 2, 3):
        log(row(step))
        assert steps(path) == list(range(1, step + 1))
    log.close()


def test_a_resumed_run_supersedes_what_came_after_its_start(path):
    write(path, row(10, loss=1.0), row(20, loss=1.0), row(22, loss=1.0), row(40, loss=1.0))
    write(path, row(25, started=20, loss=2.0), row(45, started=20, loss=2.0))
    assert [(record["step"], record["loss"]) for record in read(path)] == [(10, 1.0), (20, 1.0), (25, 2.0), (45, 2.0)]


def test_a_run_from_the_beginning_begins_the_file_again(path):
    write(path, row(10), row(20))
    write(path, row(5))
    assert steps(path) == [5]


def test_later_rows_of_an_attempt_supersede_nothing(path):
    write(path, row(10, started=10), row(20, started=10), row(15, started=10))
    assert steps(path) == [10, 20, 15]


def test_where_nothing_is_superseded_the_file_is_not_replaced(path):
    write(path, row(10))
    before = os.stat(path).st_ino
    write(path, row(20, started=10))
    assert os.stat(path).st_ino == before
    assert steps(path) == [10, 20]


def test_a_line_cut_at_any_byte_is_dropped(path):
    first, second = row(10, loss=1.0), row(20, loss=math.nan, **{"curly}": 1.0})
    write(path, first, second)
    whole = path.read_bytes()
    start, end = whole.index(b"\n") + 1, len(whole) - 1
    for cut in range(start, end):
        path.write_bytes(whole[:cut])
        assert steps(path) == [10], whole[:cut]
        write(path, row(30, started=20))
        assert steps(path) == [10, 30], whole[:cut]
    # Without its end of line only, it is whole.
    path.write_bytes(whole[:end])
    assert steps(path) == [10, 20]
    write(path, row(30, started=20))
    assert path.read_bytes().startswith(whole)
    assert steps(path) == [10, 20, 30]


def test_a_kill_while_the_file_is_replaced_loses_nothing(path, monkeypatch):
    write(path, row(10), row(20), row(30))
    before = path.read_bytes()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            jsonl(path)(row(25, started=20))
    assert path.read_bytes() == before
    write(path, row(25, started=20))
    assert steps(path) == [10, 20, 25]
    assert os.listdir(path.parent) == [path.name]


def test_what_replaces_the_file_reaches_the_disk_before_its_name(path, monkeypatch):
    write(path, row(10), row(20))
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(f"fsync {os.fstat(file).st_size}"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (calls.append("replace"), replace(self, to)))
    write(path, row(15, started=10))
    kept = len(path.read_bytes().split(b"\n")[0]) + 1
    assert calls == [f"fsync {kept}", "replace"]


def test_a_replaced_file_keeps_its_mode_and_its_links(tmp_path):
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    write(real, row(10), row(20))
    real.chmod(0o640)
    link.symlink_to(real.name)
    write(link, row(15, started=10))
    assert link.is_symlink()
    assert steps(real) == [10, 15]
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "line", ["", "half a line", '{"step": 2', "[1]", '{"loss": 1.0}', '{"step": "2"}', '{"step": 2, "loss": null}']
)
def test_a_file_of_something_else_is_refused_and_left_alone(path, line):
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    path.write_text(text)
    for use in (lambda: read(path), lambda: jsonl(path)(row(1))):
        with pytest.raises(ValueError, match=r"log\.jsonl', line 2: expected a JSON object with an integer step"):
            use()
    assert path.read_text() == text


def test_a_text_without_an_end_is_not_taken_for_a_cut_line(path):
    path.write_text("notes")
    with pytest.raises(ValueError, match=r"line 1: .* got 'notes'"):
        jsonl(path)(row(1))
    assert path.read_text() == "notes"


def test_nothing_is_made_before_the_first_row(tmp_path):
    path = tmp_path / "runs" / "a" / "log.jsonl"
    log = jsonl(path)
    assert os.listdir(tmp_path) == []
    log(row(1))
    log.close()
    assert steps(path) == [1]


def test_a_path_that_cannot_be_used_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=f"cannot use '{re.escape(str(tmp_path))}': Is a directory; expected a file that can be"
    ):
        jsonl(tmp_path)(row(1))
    with pytest.raises(ValueError, match=r"cannot use '.*file/log': .*; expected a file that can be"):
        jsonl(tmp_path / "file" / "log")(row(1))
    with pytest.raises(ValueError, match=r"cannot use '.*missing': No such file or directory; expected a file of rows"):
        read(tmp_path / "missing")

    def forbidden(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")  # root may write anywhere

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ValueError, match=r"cannot use '.*log': Permission denied; expected a file that can be"):
        jsonl(tmp_path / "log")(row(1))


def test_a_failed_first_row_can_be_repeated(tmp_path):
    path = tmp_path / "log"
    path.mkdir()
    log = jsonl(path)
    with pytest.raises(ValueError, match="Is a directory"):
        log(row(1))
    path.rmdir()
    log(row(1))
    log.close()
    assert steps(path) == [1]
