"""Files of reports where something else lies, no space is left, or nobody may write: told, and nothing lost."""

import errno
import json
import os

import pytest

import forgather_fn as ff
from forgather_fn.reports import Row, curve, jsonl, mlflow, plot, read, tensorboard, tracked
from forgather_fn.reports import path as paths


def row(step, started=0, **values):
    return Row(step=step, samples=4 * step, seconds=1.0, started=started, values={"loss": 1.0, **values})


def written(path, steps, started=0):
    sink = jsonl(path)
    for step in steps:
        sink(row(step, started))
    sink.close()


class TestALink:
    def test_in_place_of_what_is_written_beside_is_not_written_through(self, tmp_path):
        mine, log = tmp_path / "thesis", tmp_path / "log.jsonl"
        mine.write_text("years of work")
        (tmp_path / "log.jsonl.tmp").symlink_to(mine)
        written(log, [1, 2, 3])
        written(log, [2], started=1)
        assert mine.read_text() == "years of work"
        assert [line["step"] for line in read(log)] == [1, 2]

    def test_in_place_of_the_ids_beside_is_not_written_through(self, tmp_path, tracker):
        mine = tmp_path / "thesis"
        mine.write_text("years of work")
        (tmp_path / "trackers.json.tmp").symlink_to(mine)
        tracker(tmp_path)(row(1))
        assert mine.read_text() == "years of work"
        assert json.loads((tmp_path / "trackers.json").read_text()) == {"json": "an-id"}

    def test_in_place_of_the_file_stays_one(self, tmp_path):
        real, log = tmp_path / "real.jsonl", tmp_path / "log.jsonl"
        real.write_text("")
        log.symlink_to(real)
        written(log, [1, 2, 3])
        written(log, [2], started=1)
        assert log.is_symlink()
        assert [line["step"] for line in read(real)] == [1, 2]


@pytest.mark.timeout(20)
class TestWhatIsNoFile:
    @pytest.fixture(params=["pipe", "directory"])
    def place(self, request, tmp_path):
        path = tmp_path / "metrics.jsonl"
        os.mkfifo(path) if request.param == "pipe" else path.mkdir()
        return path

    def test_is_not_waited_for(self, place, tmp_path):
        for look in (
            lambda: read(place),
            lambda: curve(place, tmp_path / "c.svg", title="t"),
            lambda: written(place, [1]),
        ):
            with pytest.raises(ValueError, match=r"metrics\.jsonl'.*expected a"):
                look()

    def test_is_not_drawn(self, tmp_path):
        pytest.importorskip("matplotlib")
        os.mkfifo(tmp_path / "metrics.jsonl")
        with pytest.raises(ValueError, match=r"metrics\.jsonl'.*expected a"):
            plot([tmp_path], tmp_path / "p.png")

    def test_in_place_of_the_ids_is_not_waited_for(self, tmp_path, tracker):
        os.mkfifo(tmp_path / "trackers.json")
        with pytest.raises(ValueError, match=r"trackers\.json"):
            tracker(tmp_path)(row(1))


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    written(log, range(1, 50))
    monkeypatch.setattr(paths, "LARGEST", 1000)
    for look in (lambda: read(log), lambda: written(log, [50])):
        with pytest.raises(ValueError, match=r"log\.jsonl' has \d+ bytes, .* more than the 1000"):
            look()


@pytest.fixture
def tracker(monkeypatch):
    """Make sinks of a tracker whose package is one of Python's own."""

    def make(directory):
        def begin(package, known):
            made.known = known
            return tracked.TrackedRun("an-id", lambda step, numbers: made.log(step), made.ended.append)

        return tracked.tracked("json", "json", directory, begin)

    made = make
    made.ended, made.log = [], lambda step: None
    return make


class TestIds:
    @pytest.mark.parametrize(
        "content",
        [b"\xff\xfe", b"[" * 100_000, b"{", b"[]", b'{"json": 3}', b'{"json": ["a"]}', b"9" * 5000, b"null"],
        ids=range(8),
    )
    def test_that_are_none_are_refused_and_stay(self, tmp_path, tracker, content):
        path = tmp_path / "trackers.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"trackers\.json.*expected a JSON object with the ids"):
            tracker(tmp_path)(row(1))
        assert path.read_bytes() == content

    def test_that_cannot_be_kept_end_the_run(self, tmp_path, tracker, monkeypatch):
        monkeypatch.setattr("pathlib.Path.replace", refusing)
        with pytest.raises(ValueError, match=r"trackers\.json.*No space left"):
            tracker(tmp_path)(row(1))
        assert tracker.ended == [True]
        assert os.listdir(tmp_path) == []


def refusing(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestNoSpace:
    def test_for_the_lines_that_stay_loses_none(self, tmp_path, monkeypatch):
        log = tmp_path / "log.jsonl"
        written(log, [1, 2, 3])
        before = log.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refusing)
            with pytest.raises(ValueError, match=r"log\.jsonl.*No space left"):
                written(log, [2], started=1)
        assert log.read_bytes() == before
        assert os.listdir(tmp_path) == ["log.jsonl"]

    def test_for_a_line_is_told_with_the_path_and_gone_on_after(self, tmp_path):
        with pytest.raises(ValueError, match=r"cannot use '/dev/full|is no regular file"):
            written("/dev/full", [1])
        log = tmp_path / "log.jsonl"
        sink, limit = jsonl(log), 150
        sink(row(1))
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(ValueError, match=r"log\.jsonl'.*File too large"):
                sink(row(2, note=1.0, another=2.0, third=3.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sink(row(3))  # there is space again
        sink.close()
        assert [line["step"] for line in read(log)] == [1, 2, 3]

    def test_for_an_event_is_told_with_the_path(self, tmp_path, monkeypatch):
        from torch.utils.tensorboard import SummaryWriter

        sink = tensorboard(tmp_path)
        sink(row(1))
        monkeypatch.setattr(SummaryWriter, "flush", refusing)
        with pytest.raises(ValueError, match=r"cannot use .*No space left"):
            sink(row(2))
        monkeypatch.undo()
        sink.close()


class TestNoPermission:
    @pytest.mark.skipif(os.geteuid() == 0, reason="root may do anything")
    def test_of_a_directory(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            written(tmp_path / "log.jsonl", [1])

    def test_of_what_is_there(self, tmp_path, monkeypatch):
        log = tmp_path / "log.jsonl"
        written(log, [1])

        def refused(path, *args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

        monkeypatch.setattr(os, "open", refused)
        for look in (lambda: read(log), lambda: written(log, [2])):
            with pytest.raises(ValueError, match=r"cannot use .*log\.jsonl.*Permission denied"):
                look()


@pytest.mark.parametrize("name", ["os.fsync", "pathlib.Path.replace"])
def test_interrupted_before_lines_are_replaced_loses_none(tmp_path, monkeypatch, name):
    log = tmp_path / "log.jsonl"
    written(log, [1, 2, 3])

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            written(log, [2], started=1)
    assert [line["step"] for line in read(log)] == [1, 2, 3]
    written(log, [2], started=1)
    assert [line["step"] for line in read(log)] == [1, 2]


class TestSinks:
    @pytest.mark.parametrize("make", [jsonl, tensorboard], ids=["jsonl", "tensorboard"])
    @pytest.mark.parametrize("path", [None, 3, b"x", "", "a\0b", [], "\ud800"], ids=repr)
    def test_a_path_that_is_none(self, make, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"path|directory|cannot use"):
            make(path)(row(1))
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("value", [10**400, 1j, "x", None, [1]], ids=range(5))
    def test_a_value_that_is_none(self, tmp_path, value):
        sink = jsonl(tmp_path / "log.jsonl")
        with pytest.raises(ValueError, match="the value 'odd' of a row must be one number"):
            sink(row(1, odd=value))

    def test_a_closed_one_is_refused(self, tmp_path):
        sink = jsonl(tmp_path / "log.jsonl")
        sink.close()
        with pytest.raises(ValueError, match="was closed"):
            sink(row(1))

    @pytest.mark.parametrize("options", [{"smooth": 1.5}, {"smooth": "3"}, {"smooth": True}, {"log": "no"}], ids=repr)
    def test_a_picture_with_wrong_options(self, tmp_path, options):
        written(tmp_path / "metrics.jsonl", [1, 2])
        with pytest.raises(ValueError, match=f"plot: {next(iter(options))}"):
            plot([tmp_path], tmp_path / "p.svg", **options)

    @pytest.mark.parametrize("runs", [None, 3, "text", b"x", [3], {"a": 1}], ids=repr)
    def test_a_picture_of_no_runs(self, tmp_path, runs):
        with pytest.raises(ValueError, match="plot: "):
            plot(runs, tmp_path / "p.svg")

    def test_a_tracker_of_a_path_that_is_none(self):
        for make in (lambda: mlflow(3), lambda: mlflow(None)):
            with pytest.raises(ValueError, match=r"expected a path|not installed"):
                make()(row(1))


def test_a_report_to_what_is_no_sink_is_refused():
    with pytest.raises(ValueError, match="a sink is a function of a row"):
        ff.report("metrics.jsonl")
