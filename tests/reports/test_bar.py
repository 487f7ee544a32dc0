"""The progress bar, on a stream that says that it is a terminal, on a real one, and on neither."""

import contextlib
import io
import os

import pytest

from forgather_fn.reports.bar import bar
from forgather_fn.reports.row import Row

VALUES = {"loss": 2.34567, "learning_rate": 3e-4, "samples_per_second": 812.34, "tokens_per_second": 12345.6}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def frames(self) -> list[str]:
        return [frame.strip() for frame in self.getvalue().replace("\n", "\r").split("\r") if frame.strip()]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("TQDM_") or name in ("COLUMNS", "LINES")]:
        monkeypatch.delenv(name)


def row(step: int, *, started: int = 0, horizon: int | None = 100, **values: float) -> Row:
    seconds = 2.0 * (step - started)
    return Row(step=step, samples=0, started=started, horizon=horizon, seconds=seconds, values=values)


def test_a_frame_shows_the_figures_of_its_row():
    terminal = Terminal()
    show = bar("train", terminal)
    show(row(50, **VALUES, grad_norm=9.0))
    frame = terminal.frames()[-1]
    assert frame.startswith("train:  50%|")
    figures = "loss 2.3457, lr 3.00e-04, 812.3 samples/s, 12346 tokens/s, 0:01:40 < 0:01:40"
    assert frame.endswith(f"| 50/100, {figures}")
    show.close()


def test_a_resumed_bar_begins_where_the_run_was_restored():
    terminal = Terminal()
    show = bar(stream=terminal)
    show(row(60, started=40))
    show.close()
    first, *_, last = terminal.frames()
    assert first.startswith("40%|")
    assert "| 40/100" in first
    assert last.startswith("60%|")
    assert last.endswith("| 60/100, 0:00:40 < 0:01:20")


@pytest.mark.parametrize("horizon", [None, 5])
def test_where_the_end_is_not_known_or_passed_the_step_is_shown(horizon):
    terminal = Terminal()
    show = bar("train", terminal)
    show(row(7, horizon=horizon, loss=1.0))
    show.close()
    assert terminal.frames()[-1].startswith("train: step 7, loss 1.0000, 0:00:14 < ")


def test_an_end_that_becomes_known_is_shown():
    terminal = Terminal()
    show = bar(stream=terminal)
    show(row(10, horizon=None))
    show(row(20, horizon=40))
    show.close()
    assert terminal.frames()[-1].startswith("50%|")


def test_one_row_makes_one_frame_and_the_end_one_line():
    terminal = Terminal()
    show = bar(stream=terminal)
    show(row(1))
    before = len(terminal.frames())
    show(row(2))
    assert len(terminal.frames()) == before + 1
    assert "\n" not in terminal.getvalue()
    show.close()
    show.close()
    assert terminal.getvalue().count("\n") == 1


def test_without_a_terminal_nothing_is_written():
    stream = io.StringIO()
    show = bar("train", stream)
    show(row(50, **VALUES))
    show.close()
    assert stream.getvalue() == ""


def test_the_standard_error_is_looked_up_at_the_first_row(monkeypatch):
    show = bar()
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    show(row(50))
    show.close()
    assert "50/100" in terminal.frames()[-1]


def on_screen(controller: int) -> str:
    """All that was written to a terminal whose other end is closed; it comes in pieces."""
    pieces = []
    with contextlib.suppress(OSError):  # Linux ends with an error, others with nothing
        while piece := os.read(controller, 4096):
            pieces.append(piece)
    os.close(controller)
    return b"".join(pieces).decode()


def test_on_a_real_terminal_a_frame_fits_its_width():
    termios = pytest.importorskip("termios")
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with os.fdopen(terminal, "w", encoding="utf-8") as stream:
        show = bar("train", stream)
        show(row(50, loss=2.5))
        show.close()
    last = on_screen(controller).rstrip().split("\r")[-1]
    assert last.startswith("train:  50%|")
    assert last.endswith("| 50/100, loss 2.5000, 0:01:40 < 0:01:40")
    assert 90 <= len(last) <= 100
