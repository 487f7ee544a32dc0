import io
from collections import deque

import pytest

from forgather_fn.cli import main
from forgather_fn.control.client import SilentError, UnreachableError
from forgather_fn.control.watch import bar, one_line, sparkline, view, watch
from forgather_fn.reports import Row, jsonl
from forgather_fn.terminal import printable

STATUS = {
    "job": "a",
    "run": None,
    "step": 50,
    "horizon": 200,
    "epoch": 0.25,
    "loss": 1.5,
    "learning_rate": 1e-3,
    "steps_per_second": 10.0,
    "samples_per_second": 320.0,
    "remaining": 15.0,
    "checkpoint": {"path": "/x", "step": 40, "age": 61.0},
    "last_error": None,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def watched(out, *found):
    """Watch a job that answers so, and then has ended."""
    answers, waits = iter(found), []

    def status():
        try:
            return next(answers)
        except StopIteration:
            raise UnreachableError("gone") from None

    watch(status, out, interval=2.0, sleep=waits.append)
    assert waits == [2.0] * len(found)
    return out.getvalue()


@pytest.fixture(autouse=True)
def _utf8(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))


def test_a_view_has_what_a_status_says():
    lines = view(STATUS, deque([3.0, 2.0, 1.5]))
    assert lines[0] == f"a  {'█' * 10 + ' ' * 30}  25%  step 50 of 200  epoch 0.25"
    assert lines[1] == "  █▃▁  loss 1.5  learning rate 0.001"
    assert lines[2] == "  10 steps/s  320 samples/s  0:00:15 left"
    assert lines[3] == "  checkpoint at step 40, 0:01:01 ago"
    assert len(lines) == 4
    assert view({**STATUS, "last_error": "the disk is full"}, deque())[4] == "  last error: the disk is full"


@pytest.mark.parametrize(
    "unknown", [name for name in STATUS if name != "job"] + [("horizon", "remaining"), tuple(set(STATUS) - {"job"})]
)
def test_what_is_not_known_is_left_out(unknown):
    names = (unknown,) if isinstance(unknown, str) else unknown
    found = {**STATUS, **dict.fromkeys(names)}
    text = "\n".join([*view(found, deque()), one_line(found)])
    assert "a  " in text


@pytest.mark.parametrize(
    ("step", "blocks"), [(0, ""), (1, "▎"), (100, "█" * 20), (199, "█" * 39 + "▊"), (300, "█" * 40)]
)
def test_the_bar_is_as_long_as_the_run_is_far(step, blocks):
    assert bar({"step": step, "horizon": 200})[:40].rstrip() == blocks


def test_losses_that_are_not_finite_leave_gaps():
    assert sparkline(deque([1.0, float("nan"), 2.0, float("inf")])) == "▁ █ "
    assert sparkline(deque([float("nan")])) == ""
    assert sparkline(deque([2.0, 2.0])) == "▁▁"


def test_a_terminal_is_drawn_in_place():
    text = watched(Terminal(), STATUS, {**STATUS, "step": 51, "loss": 1.4}, {**STATUS, "loss": "nan"})
    assert text.count("\x1b[4F\x1b[J") == 2
    assert "█▁  loss 1.4" in text
    assert "█▁   loss nan" in text
    assert text.endswith("the job has ended\n")


def test_lines_are_as_long_as_the_terminal_is_wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    long = {**STATUS, "last_error": "x" * 100}
    assert max(map(len, watched(Terminal(), long).splitlines())) == 29


def test_a_file_gets_one_line_a_look():
    assert watched(io.StringIO(), STATUS) == "a  step 50  loss 1.5  0:00:15 left\nthe job has ended\n"


def test_a_job_that_does_not_answer_is_asked_again():
    answers = [SilentError("busy"), STATUS, UnreachableError("gone")]

    def status():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    out = Terminal()
    watch(status, out, sleep=lambda seconds: None)
    assert out.getvalue().startswith("the job does not answer; trying again\na  ")
    assert out.getvalue().endswith("the job has ended\n")


def test_the_line_begins_with_what_was_logged(tmp_path):
    log = jsonl(tmp_path / "metrics.jsonl")
    for step in range(1, 101):
        log(Row(step=step, samples=step, seconds=1.0, values={"loss": float(step)}))
    log.close()
    text = watched(Terminal(), {**STATUS, "run": str(tmp_path), "loss": 100.0})
    assert text.splitlines()[1].startswith("  ▁▁▁")
    (tmp_path / "metrics.jsonl").write_text("something else\n")
    assert "  ▁  loss" in watched(Terminal(), {**STATUS, "run": str(tmp_path)})


def test_what_a_terminal_would_act_on_is_shown_as_an_escape():
    assert printable("a\x1b[2Jb") == "a\\x1b[2Jb"
    assert "\\x1b" in view({**STATUS, "last_error": "\x1b]0;owned\x07"}, deque())[4]


def test_a_terminal_without_blocks_gets_question_marks(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert sparkline(deque([1.0, 2.0])) == "▁█"
    view(STATUS, deque([1.0, 2.0]))[1].encode("ascii")


@pytest.mark.parametrize("interval", ["0", "-1", "x", "nan", "inf"])
def test_an_interval_is_a_positive_number(interval, monkeypatch, capsys):
    monkeypatch.undo()
    with pytest.raises(SystemExit) as exit:
        main(["control", "watch", "a", "--interval", interval])
    assert exit.value.code == 2
