"""Trackers: the real packages, offline, read back by their own readers; and what all of them have in common."""

import importlib.util
import inspect
import json
import struct
import sys
import types
from pathlib import Path

import pytest
import toolz

import forgather_fn as ff
from forgather_fn.reports import trackers
from forgather_fn.reports.row import Row
from tests.toys import classifier, labelled_batches, program


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e '.[trackers]'")


def row(step: int, *, started: int = 0, **values: float) -> Row:
    return Row(step=step, samples=4 * step, started=started, seconds=1.0, values=values)


class Fake(types.ModuleType):
    """A package that notes what it is told, with the signature of ``trackio.init`` (0.43)."""

    def __init__(self) -> None:
        super().__init__("trackio", None)
        self.__spec__ = importlib.util.spec_from_loader("trackio", None)
        self.calls: list[tuple] = []

    def init(self, project, name=None, group=None, space_id=None, config=None, resume="never", embed=True):
        self.calls.append(("init", project, name, resume, config))
        return self

    def log(self, metrics, step=None):
        self.calls.append(("log", step, metrics))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def fake(monkeypatch) -> Fake:
    made = Fake()
    monkeypatch.setitem(sys.modules, "trackio", made)
    return made


class TestAll:
    """What is the same for each tracker, by the one that has a fake here."""

    def test_rows_are_logged_at_their_steps(self, fake, tmp_path):
        write = trackers.trackio(tmp_path, project="p", config={"a": 1})
        assert fake.calls == []
        write(row(10, loss=2.5))
        write(Row(step=20, samples=80, epoch=0.5, seconds=1.0, values={"loss": 1.5}))
        write.close()
        write.close()
        name = json.loads((tmp_path / "trackers.json").read_text())["trackio"]
        assert name.startswith(f"{tmp_path.name}-")
        assert fake.calls == [
            ("init", "p", name, "never", {"a": 1}),
            ("log", 10, {"samples": 40.0, "loss": 2.5}),
            ("log", 20, {"samples": 80.0, "epoch": 0.5, "loss": 1.5}),
            ("finish",),
        ]

    def test_a_restored_attempt_goes_on_with_the_run_and_a_new_one_begins_another(self, fake, tmp_path):
        for first in (row(1), row(5, started=4), row(1)):
            write = trackers.trackio(tmp_path / "new", project="p")
            write(first)
            write.close()
        names = [(call[2], call[3]) for call in fake.calls if call[0] == "init"]
        assert names[0][0] == names[1][0] != names[2][0]
        assert [resume for _, resume in names] == ["never", "allow", "never"]

    def test_ids_of_other_trackers_are_kept(self, fake, tmp_path):
        (tmp_path / "trackers.json").write_text('{"mlflow": "abc"}')
        trackers.trackio(tmp_path, project="p")(row(1))
        assert set(json.loads((tmp_path / "trackers.json").read_text())) == {"mlflow", "trackio"}

    def test_a_tracker_that_was_added_later_begins_a_run(self, fake, tmp_path):
        trackers.trackio(tmp_path, project="p")(row(5, started=4))
        assert fake.calls[0][3] == "never"

    @pytest.mark.parametrize("make", [trackers.wandb, trackers.mlflow, trackers.trackio])
    def test_a_package_that_is_missing_is_told_before_the_training(self, make, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        options = {} if make is trackers.mlflow else {"project": "p"}
        with pytest.raises(ValueError, match=rf"{make.__name__} is not installed.*: pip install '{make.__name__}"):
            make(tmp_path, **options)
        assert list(tmp_path.iterdir()) == []

    def test_a_package_that_is_broken_is_told_at_the_first_row(self, fake, tmp_path, monkeypatch):
        write = trackers.trackio(tmp_path, project="p")
        monkeypatch.setitem(sys.modules, "trackio", None)
        with pytest.raises(ValueError, match=r"trackio cannot be imported .*: pip install 'trackio>="):
            write(row(1))

    def test_a_file_of_ids_that_is_none_is_refused(self, fake, tmp_path):
        (tmp_path / "trackers.json").write_text("[]")
        with pytest.raises(ValueError, match=r"trackers\.json: expected a JSON object"):
            trackers.trackio(tmp_path, project="p")(row(1))
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=r"cannot use '.*file'.*expected the directory of a run"):
            trackers.trackio(tmp_path / "file", project="p")(row(1))


def trained(sink, failing=False) -> None:
    made = program(classifier())

    def fail(tick):
        if failing and tick.state.step == 2:
            raise RuntimeError("boom")

    stages = ff.every(1, ff.report(sink)), ff.every(1, fail)
    toolz.pipe(made.steps(made.init(0), labelled_batches(3)), *stages, ff.last)


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    needs("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("DO_NOT_TRACK", "true")
        yield f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


class TestMlflow:
    pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # MLflow's own use of SQLAlchemy

    def found(self, uri: str, directory: Path):
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        run = client.get_run(json.loads((directory / "trackers.json").read_text())["mlflow"])
        history = {
            key: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        return run, history

    def test_rows_are_metrics_and_a_restored_attempt_goes_on(self, uri, tmp_path):
        options = {"tracking_uri": uri, "experiment": "rows", "name": "a", "config": {"schedule": 0.1}}
        for started, last in ((0, 3), (2, 4)):
            write = trackers.mlflow(tmp_path, **options)
            for step in range(started + 1, last + 1):
                write(row(step, started=started, **{"loss": float(step), "grad_norm/0.weight": 0.5}))
            write.close()
        run, history = self.found(uri, tmp_path)
        assert (run.info.run_name, run.info.status, run.data.params) == ("a", "FINISHED", {"schedule": "0.1"})
        assert history["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.0), (4, 4.0)]
        assert set(history) == {"loss", "samples", "grad_norm/0.weight"}

    def test_more_metrics_than_one_call_takes(self, uri, tmp_path):
        values = {f"v{i}": float(i) for i in range(1002)}
        write = trackers.mlflow(tmp_path, tracking_uri=uri, config={f"p{i}": i for i in range(150)})
        write(row(1, **values))
        write.close()
        run, _ = self.found(uri, tmp_path)
        assert run.data.metrics == {"samples": 4.0, **values}
        assert len(run.data.params) == 150

    def test_a_training_that_fails_is_a_run_that_failed(self, uri, tmp_path):
        with pytest.raises(RuntimeError, match="boom"):
            trained(trackers.mlflow(tmp_path / "failed", tracking_uri=uri), failing=True)
        try:
            raise KeyError("somebody else's")
        except KeyError:
            trained(trackers.mlflow(tmp_path / "good", tracking_uri=uri))
        assert self.found(uri, tmp_path / "failed")[0].info.status == "FAILED"
        good, history = self.found(uri, tmp_path / "good")
        assert good.info.status == "FINISHED"
        assert [step for step, _ in history["loss"]] == [1, 2, 3]


def logged(content: bytes):
    """The records of a file of Weights & Biases, which is a log of LevelDB behind seven bytes of its own."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no header begins so late in a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or its last part
            yield record
            record = b""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    needs("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("wandb")))
        import wandb

        yield
        wandb.teardown()


@pytest.mark.usefixtures("offline")
class TestWandb:
    def records(self, directory: Path):
        """What each attempt wrote, by its kind, as it would be sent."""
        import wandb
        from wandb.proto.wandb_internal_pb2 import Record

        wandb.teardown()  # which waits for what is still being written

        for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
            found: dict[str, list] = {}
            for data in logged(path.read_bytes()):
                record = Record()
                record.ParseFromString(data)
                kind = record.WhichOneof("record_type")
                found.setdefault(kind, []).append(getattr(record, kind))
            yield found

    def test_rows_are_history_and_a_restored_attempt_goes_on_with_the_run(self, tmp_path):
        for started, last in ((0, 3), (2, 4)):
            write = trackers.wandb(tmp_path, project="p", config={"schedule": "0.1"})
            for step in range(started + 1, last + 1):
                write(row(step, started=started, **{"loss": float(step), "grad_norm/0.weight": float("nan")}))
            write.close()
        attempts = list(self.records(tmp_path))
        assert len(attempts) == 2
        ids, history = set(), []
        for records in attempts:
            ids |= {run.run_id for run in records["run"]}
            rows = [history.item for history in records["history"]]
            history.append(
                [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in items} for items in rows]
            )
            assert [ended.exit_code for ended in records["exit"]] == [0]
            assert [(metric.glob_name, metric.step_metric) for metric in records["metric"]][:1] == [("*", "step")]
        assert ids == {json.loads((tmp_path / "trackers.json").read_text())["wandb"]}
        assert sorted([[(r["step"], r["loss"]) for r in rows] for rows in history]) == [
            [(1, 1.0), (2, 2.0), (3, 3.0)],
            [(3, 3.0), (4, 4.0)],
        ]

    def test_a_training_that_fails_is_a_run_that_failed(self, tmp_path):
        with pytest.raises(RuntimeError, match="boom"):
            trained(trackers.wandb(tmp_path, project="p"), failing=True)
        (records,) = self.records(tmp_path)
        assert [ended.exit_code for ended in records["exit"]] == [1]


def test_trackio_keeps_rows_and_goes_on(tmp_path, monkeypatch):
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    try:
        import trackio
    except ImportError as error:
        pytest.skip(f"the trackio that is installed cannot be imported: {error}")
    if "resume" not in inspect.signature(trackio.init).parameters:
        pytest.skip(f"trackio {trackio.__version__} cannot go on with a run: pip install 'trackio>=0.20'")
    for started, last in ((0, 3), (2, 4)):
        write = trackers.trackio(tmp_path / "run", project="p")
        for step in range(started + 1, last + 1):
            write(row(step, started=started, loss=float(step)))
        write.close()
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("p")
    assert name == json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"]
    logs = SQLiteStorage.get_logs("p", name)
    assert sorted((entry["step"], entry["loss"]) for entry in logs) == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (3, 3.0),
        (4, 4.0),
    ]
