"""Rows, the estimate of the time left, and sinks made of functions."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgather_fn.reports.row import Row, Sink, opened, remaining, sink


def row(step: int = 1, **values: float) -> Row:
    return Row(step=step, samples=32 * step, seconds=float(step), values=values)


def test_values_are_a_read_only_copy_in_floats():
    given = {"loss": torch.tensor(2.5), "count": 3}
    made = Row(step=1, samples=1, seconds=0.0, values=given)
    given["loss"] = torch.tensor(0.0)
    assert dict(made.values) == {"loss": 2.5, "count": 3.0}
    assert [type(value) for value in made.values.values()] == [float, float]
    with pytest.raises(TypeError):
        made.values["loss"] = 0.0


@pytest.mark.parametrize("name", ["step", "samples", "epoch", "started", "horizon", "seconds", "values"])
def test_a_value_cannot_hide_a_field(name):
    with pytest.raises(ValueError, match=f"a row has a field '{name}' of its own"):
        Row(step=1, samples=1, seconds=0.0, values={name: 1.0})


@pytest.mark.parametrize("value", [torch.zeros(2), None, "low", [1.0]])
def test_a_value_is_one_number(value):
    with pytest.raises(ValueError, match="the value 'loss' of a row must be one number"):
        row(loss=value)


def test_a_row_does_not_come_before_its_attempt():
    with pytest.raises(ValueError, match="step 4 cannot belong to an attempt that started at 5"):
        Row(step=4, samples=0, started=5, seconds=0.0, values={})


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 1000))
def test_at_a_constant_pace_the_estimate_is_exact(started, taken, left, milliseconds):
    step = started + taken
    at = Row(step=step, samples=0, started=started, horizon=step + left, seconds=taken * milliseconds / 1000, values={})
    assert remaining(at) == pytest.approx(left * milliseconds / 1000, rel=1e-12)


def test_the_estimate_is_none_where_nothing_is_known_and_zero_beyond_the_end():
    assert remaining(row()) is None
    assert remaining(Row(step=5, samples=0, started=5, horizon=9, seconds=0.0, values={})) is None
    assert remaining(Row(step=5, samples=0, horizon=4, seconds=1.0, values={})) == 0.0


def test_a_function_becomes_a_sink_once():
    rows: list[Row] = []
    lifted = sink(rows.append)
    assert isinstance(lifted, Sink)
    assert sink(lifted) is lifted
    lifted(row(3))
    lifted.close()
    assert rows == [row(3)]


def journal(fail: bool = False) -> tuple[list[object], Sink]:
    events: list[object] = []

    def open(row: Row) -> list[object]:
        if fail:
            raise ValueError("cannot open")
        events.append(("open", row.step))
        return events

    made = opened(
        "journal()", open, lambda held, row: held.append(("write", row.step)), lambda held: held.append("close")
    )
    return events, made


def test_what_is_opened_opens_at_the_first_row_and_closes_once():
    events, made = journal()
    assert events == []
    made(row(7))
    made(row(8))
    made.close()
    made.close()
    assert events == [("open", 7), ("write", 7), ("write", 8), "close"]


def test_what_saw_no_row_is_neither_opened_nor_closed():
    events, made = journal()
    made.close()
    assert events == []


def test_what_failed_to_open_is_not_closed():
    events, made = journal(fail=True)
    with pytest.raises(ValueError, match="cannot open"):
        made(row())
    made.close()
    assert events == []


def test_a_closed_sink_refuses_rows():
    events, made = journal()
    made(row(1))
    made.close()
    with pytest.raises(ValueError, match=r"journal\(\) was closed before the row at step 2: make a new sink"):
        made(row(2))
    assert events[-1] == "close"


def test_importing_and_composing_load_neither_tqdm_nor_tensorboard():
    text = """
import io, sys, torch  # torch itself loads tqdm where it is installed
for name in [name for name in sys.modules if name.split(".")[0] in ("tqdm", "tensorboard")]:
    del sys.modules[name]
from forgather_fn.reports import Row, bar, console, jsonl, tensorboard
sinks = [bar(stream=io.StringIO()), tensorboard("nowhere"), jsonl("nowhere"), console()]
sinks[0](Row(step=1, samples=1, seconds=1.0, values={}))
print([name for name in sys.modules if name.split(".")[0] in ("tqdm", "tensorboard")])
"""
    shown = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
