"""Files of rows that anything may have been written into: rows, or an error that names the file and the line."""

import contextlib
from collections import deque

import pytest
from hypothesis import strategies as st

from forgather_fn.control.dashboard.data import curves
from forgather_fn.control.watch import _logged, sparkline
from forgather_fn.reports import Row, curve, jsonl, read
from tests.robustness.inputs import as_bytes, budget, changed, holds, leaves, mutated, values

ROWS = (
    b'{"step": 1, "samples": 4, "epoch": 0.5, "seconds": 0.25, "loss": 2.5, "eval_loss": "nan"}\n'
    b'{"step": 2, "samples": 8, "seconds": 0.5, "loss": "inf", "learning_rate": 0.001}\n'
    b'{"step": 3, "samples": 12, "seconds": 1, "loss": 1.5}\n'
)
RECORD = {"step": 1, "samples": 4, "epoch": 0.5, "seconds": 0.25, "loss": 2.5, "eval_loss": "nan"}


@contextlib.contextmanager
def told(*paths):
    """Let an error pass that names one of the files."""
    try:
        yield
    except ValueError as error:
        if not any(str(path) in str(error) for path in paths):
            raise


def look_at(path, picture):
    """Read a file of rows in every way that there is."""
    with told(path):
        read(path)
    with told(path, picture):
        curve(path, picture, title="t")
        assert picture.read_text().startswith("<svg")
        assert "nan" not in picture.read_text()
        assert "inf" not in picture.read_text()
    curves(path)
    sparkline(deque(_logged(str(path.parent))))


class TestAFile:
    @budget(25)
    def test_of_changed_bytes_is_read_or_refused(self, tmp_path, examples):
        path = tmp_path / "metrics.jsonl"

        def check(data):
            path.write_bytes(data)
            look_at(path, tmp_path / "curve.svg")

        holds(check, mutated(ROWS), examples)

    @budget(30)
    def test_of_other_lines_is_read_or_refused(self, tmp_path, examples):
        path = tmp_path / "metrics.jsonl"

        def check(records):
            path.write_bytes(b"".join(as_bytes(record) + b"\n" for record in records))
            look_at(path, tmp_path / "curve.svg")

        rows = st.fixed_dictionaries({"step": st.integers(0, 9)}, optional={"loss": leaves, "eval_loss": leaves})
        holds(check, st.lists(rows | changed(RECORD) | values, max_size=4), examples)

    @budget(20)
    def test_of_anything_is_gone_on_with_or_left_as_it_is(self, tmp_path, examples):
        path = tmp_path / "metrics.jsonl"

        def check(data):
            path.write_bytes(data)
            sink = jsonl(path)
            try:
                sink(Row(step=3, samples=12, seconds=1.0, started=2, values={"loss": 1.0}))
            except ValueError as error:
                reason = str(error)
            else:
                sink.close()
                assert read(path)[-1]["step"] == 3
                return
            assert str(path) in reason
            assert path.read_bytes() == data

        holds(check, mutated(ROWS), examples)


class TestWhatWasFound:
    """Each of these once ended in an error of Python's own."""

    @pytest.mark.parametrize(
        "line",
        [
            b"[" * 100_000,
            b'{"step": 1, "loss": ' + b"[" * 100_000,
            b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
            b'{"step": 1' + b"0" * 400 + b"}",
            b'{"step": true}',
            b'{"step": 1, "loss": ' + b"9" * 5000 + b"}",
        ],
        ids=["nested", "a nested value", "a large value", "a large step", "a step that is true", "many digits"],
    )
    def test_in_a_line(self, tmp_path, line):
        path = tmp_path / "metrics.jsonl"
        for content, number in ((line + b"\n", 1), (b'{"step": 1}\n' + line + b'\n{"step": 2}\n', 2)):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"metrics\.jsonl', line {number}: expected a JSON object"):
                read(path)
            with pytest.raises(ValueError, match="expected a JSON object"):
                jsonl(path)(Row(step=3, samples=1, seconds=1.0, values={}))
            assert path.read_bytes() == content
            assert curves(path) == {}

    @pytest.mark.parametrize("losses", [(1e308, -1e308), (0.0, 5e-324), (5e-324, -5e-324), (1e299, -1e299), (0.0, 0.0)])
    def test_in_the_size_of_losses(self, tmp_path, losses):
        rows = [Row(step=i, samples=0, seconds=0.0, values={"loss": loss}) for i, loss in enumerate([*losses, 1e-320])]
        curve(rows, tmp_path / "c.svg", title="t")
        picture = (tmp_path / "c.svg").read_text()
        assert "nan" not in picture
        assert "inf" not in picture
        assert len(picture) < 10_000
