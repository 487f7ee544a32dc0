"""TensorBoard events, read back with TensorBoard's own reader."""

import itertools
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from forgather_fn.reports.row import Row
from forgather_fn.reports.tensorboard import tensorboard


@pytest.fixture(autouse=True)
def counted_seconds(monkeypatch):
    # TensorBoard reads files in the order of their names, which begin with the second in which they were opened.
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=itertools.count(1000).__next__))


def row(step: int, *, started: int = 0, **values: float) -> Row:
    return Row(step=step, samples=0, started=started, seconds=1.0, values=values)


def events(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(directory))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_values_are_scalars_by_name_at_the_step(tmp_path):
    write = tensorboard(tmp_path / "runs" / "a")
    write(row(10, loss=2.5, learning_rate=0.25))
    write(row(20, loss=1.5, eval_loss=1.75))
    write.close()
    assert events(tmp_path / "runs" / "a") == {
        "loss": [(10, 2.5), (20, 1.5)],
        "learning_rate": [(10, 0.25)],
        "eval_loss": [(20, 1.75)],
    }


def test_values_that_are_not_finite_are_kept(tmp_path):
    write = tensorboard(tmp_path)
    write(row(1, loss=math.nan, grad_norm=-math.inf))
    write.close()
    read = events(tmp_path)
    assert math.isnan(read["loss"][0][1])
    assert read["grad_norm"] == [(1, -math.inf)]


def test_a_killed_run_shows_all_its_rows(tmp_path):
    write = tensorboard(tmp_path)
    for step in range(1, 6):
        write(row(step, loss=float(step)))
    assert events(tmp_path)["loss"] == [(step, float(step)) for step in range(1, 6)]
    write.close()


def test_a_resumed_run_shows_no_step_twice_and_keeps_the_one_it_was_restored_at(tmp_path):
    killed = tensorboard(tmp_path)
    for step in (10, 20, 30, 40):
        killed(row(step, loss=1.0))
    killed.close()
    resumed = tensorboard(tmp_path)
    for step in (30, 40, 50):
        resumed(row(step, started=20, loss=2.0))
    resumed.close()
    assert events(tmp_path)["loss"] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]


def test_superseded_steps_that_are_not_reported_again_are_hidden_too(tmp_path):
    killed = tensorboard(tmp_path)
    killed(row(10, eval_loss=1.0))
    killed(row(25, eval_loss=1.0))
    killed(row(40, eval_loss=1.0))
    killed.close()
    resumed = tensorboard(tmp_path)
    resumed(row(30, started=20, loss=2.0))
    resumed.close()
    assert events(tmp_path) == {"eval_loss": [(10, 1.0)], "loss": [(30, 2.0)]}


def test_closing_ends_the_thread_of_the_writer(tmp_path):
    before = threading.enumerate()
    write = tensorboard(tmp_path)
    write(row(1, loss=1.0))
    assert threading.enumerate() != before
    write.close()
    assert threading.enumerate() == before


def test_nothing_is_made_before_the_first_row(tmp_path):
    write = tensorboard(tmp_path / "run")
    write.close()
    assert not (tmp_path / "run").exists()


def test_a_path_that_cannot_be_used_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot use '.*file': File exists; expected a directory"):
        tensorboard(tmp_path / "file")(row(1, loss=1.0))
    with pytest.raises(ValueError, match=r"cannot use '.*file/run': Not a directory; expected a directory"):
        tensorboard(tmp_path / "file" / "run")(row(1, loss=1.0))
    # Root may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"cannot use '.*': no permission to write; expected a directory"):
        tensorboard(tmp_path)(row(1, loss=1.0))
