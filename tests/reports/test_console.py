"""Plain lines for logs."""

import io

import pytest

from forgather_fn.reports.console import clock, console, line, short
from forgather_fn.reports.row import Row


def row(step: int, **values: float) -> Row:
    return Row(step=step, samples=0, epoch=step / 500, horizon=1000, seconds=step * 2.0, values=values)


def test_lines():
    stream = io.StringIO()
    write = console(stream)
    write(row(10, loss=2.34567, learning_rate=3e-4, tokens_per_second=81234.4))
    write(row(1000, loss=11.5, learning_rate=0.125, tokens_per_second=912.34, eval_loss=2.0))
    write(Row(step=7, samples=0, seconds=3661.0, values={"loss": float("nan")}))
    write.close()
    assert stream.getvalue().splitlines() == [
        "step   10/1000   0:00:20 <  0:33:00  epoch   0.0200  loss    2.3457  learning_rate  3.00e-04"
        "  tokens_per_second     81234",
        "step 1000/1000   0:33:20 <  0:00:00  epoch   2.0000  loss   11.5000  learning_rate    0.1250"
        "  tokens_per_second     912.3  eval_loss    2.0000",
        "step        7   1:01:01 <        ?  loss       nan",
    ]


@pytest.mark.parametrize("loss", [0.0, -0.5, 1e-5, -1e-5, 3.25, 999.99, 1e3, 1e6, -9e6, 1e7, 1e30, float("-inf")])
def test_columns_stay_aligned(loss):
    plain, other = line(row(10, loss=1.0, grad_norm=1.0)), line(row(990, loss=loss, grad_norm=1.0))
    assert plain.index("grad_norm") == other.index("grad_norm")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 0.0, "0.0000"),
        ("loss", 0.00123, "0.0012"),
        ("loss", 0.000999, "9.99e-04"),
        ("loss", -2.5, "-2.5000"),
        ("loss", 123456.7, "123457"),
        ("loss", 2.5e7, "2.50e+07"),
        ("loss", float("inf"), "inf"),
        ("learning_rate", 0.0, "0.0000"),
        ("learning_rate", 0.00125, "1.25e-03"),
        ("learning_rate", 0.1, "0.1000"),
        ("samples_per_second", 81.26, "81.3"),
        ("samples_per_second", 0.0005, "5.00e-04"),
    ],
)
def test_numbers_are_short(name, value, text):
    assert short(name, value) == text


def test_durations():
    assert [clock(seconds) for seconds in (None, 0.0, 59.99, 60.0, 3599.0, 360000.0)] == [
        "?",
        "0:00:00",
        "0:00:59",
        "0:01:00",
        "0:59:59",
        "100:00:00",
    ]


def test_the_standard_output_is_looked_up_at_each_row(capsys):
    write = console()
    write(row(1))
    assert capsys.readouterr().out == line(row(1)) + "\n"


def test_lines_are_flushed():
    class Counting(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    stream = Counting()
    console(stream)(row(1))
    assert stream.flushed == line(row(1)) + "\n"
