"""Checkpoints of which any file holds anything: what is read is right, or is refused by name."""

import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import shutil
import struct

import pytest
from hypothesis import strategies as st

from forgather_fn.checkpoint import CheckpointError, list_checkpoints, load, load_weights, save, verify
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.catalog import latest
from forgather_fn.cli import main
from tests.checkpoint.faults import assert_same
from tests.checkpoint.faults import leaves as held
from tests.checkpoint.subjects import small, trajectory
from tests.robustness.inputs import as_bytes, budget, changed, holds, mutated, nested, values


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    caplog.set_level(logging.CRITICAL)


@pytest.fixture(scope="module")
def program():
    return small()


@pytest.fixture(scope="module")
def original(tmp_path_factory, program):
    program.init(0)
    return save(program, trajectory()[3], tmp_path_factory.mktemp("run"))


@pytest.fixture
def home(original, tmp_path):
    """A copy, which a test may write anything into."""
    place = tmp_path / "run" / "checkpoints" / original.name
    shutil.copytree(original, place)
    return place


def look_at(home):
    """Look at a checkpoint in every way that only looks: nothing is raised, whatever it is."""
    run = home.parent.parent
    for entry in list_checkpoints(run):
        verify(entry.path)
    latest(run)
    for action in ("list", "verify", "show"):
        with (
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            assert main(["checkpoint", action, str(run)]) in (0, 1, 2)


def refused(error, home):
    """A refusal says which checkpoint, and holds no more than a page."""
    assert str(home) in str(error)
    assert len(str(error)) < 20_000


FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json")


class TestBytes:
    @budget(10)
    def test_that_changed_are_seen_or_change_nothing(self, program, home, original, examples):
        data = {name: (original / name).read_bytes() for name in FILES}
        expected = held(trajectory()[3])

        def check(one):
            name, found = one
            (home / name).write_bytes(found)
            look_at(home)
            try:
                state = program.restore(home)
            except CheckpointError as error:
                refused(error, home)
            else:
                assert_same(held(state), expected)
            (home / name).write_bytes(data[name])

        files = st.sampled_from(FILES).flatmap(lambda name: st.tuples(st.just(name), mutated(data[name])))
        holds(check, files, examples)

    @budget(7)
    def test_that_somebody_sealed_give_a_state_or_a_refusal(self, program, home, original, examples):
        def check(found):
            write(home, {"model.safetensors": found})
            look_at(home)
            read_all(program, home)

        holds(check, mutated((original / "model.safetensors").read_bytes()), examples)


def write(home, files):
    """Put files into a checkpoint, with a manifest that fits: as one would who knows the format."""
    record = json.loads((home / "manifest.json").read_bytes())
    for name, data in files.items():
        (home / name).write_bytes(data)
        record["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    seal(home, record)


def seal(home, record):
    if isinstance(record, dict):
        record.pop("checksum", None)
        record = {**record, "checksum": manifests._checksum(record)}
    (home / "manifest.json").write_bytes(as_bytes(record))


def read_all(program, home):
    """Read a checkpoint in every way: what comes is an answer, or a refusal that names it."""
    state = program.init(1)
    ways = (
        lambda: load(home),
        lambda: load(home, lambda length: slice(0, length // 2)),
        lambda: program.restore(home),
        lambda: program.restore(home, without={"optimizer", "ema", "transforms", "controls", "progress"}),
        lambda: program.restore(home, allow={"model", "data", "batch_size"}),
        lambda: load_weights(state, home),
    )
    for way in ways:
        try:
            way()
        except CheckpointError as error:
            refused(error, home)


class TestTheManifest:
    @budget(15)
    def test_of_any_content_is_read_or_refused(self, program, home, original, examples):
        record = json.loads((original / "manifest.json").read_bytes())

        def check(found):
            seal(home, found)
            look_at(home)
            read_all(program, home)

        holds(check, changed(record) | values, examples)


class TestTheStateFile:
    @budget(20)
    def test_of_any_content_is_read_or_refused(self, program, home, original, examples):
        record = json.loads((original / "state.json").read_bytes())

        def check(found):
            write(home, {"state.json": as_bytes(found)})
            look_at(home)
            read_all(program, home)

        holds(check, changed(record) | values, examples)


class TestTensors:
    @budget(15)
    def test_with_any_header_are_read_or_refused(self, program, home, original, examples):
        data = (original / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

        def check(found):
            text = as_bytes(found)
            write(home, {"model.safetensors": struct.pack("<Q", len(text)) + text + body})
            look_at(home)
            read_all(program, home)

        holds(check, changed(header) | values, examples)


class TestWhatWasFound:
    """Each of these once ended in an error of Python's own, or in another one's words."""

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (["step"], "x", "'step' is no number of batches: 'x'"),
            (["step"], -1, "'step' is no number of batches: -1"),
            (["step"], True, "'step' is no number of batches: True"),
            (["samples"], 2**63, "'samples' is no number of samples"),
            (["seed"], 0.5, "'seed' is no seed: 0.5"),
            (["seed"], math.inf, "'seed' is no seed: inf"),
            (["batch_size"], [4], "'batch_size' is no number of samples, or null"),
            (["version"], None, "'version' is no version: None"),
            (["counters", "updates"], 2**63, "'counters' is no mapping with numbers for updates"),
            (["counters", "tokens"], math.nan, "'counters' is no mapping with numbers for updates"),
            (["structure", "opt"], nested(200, "mapping"), "'structure' is no description of trees"),
            (
                ["structure", "opt"],
                {"mapping": {"a": {"value": "x", "kind": "float"}}},
                "'structure' is no description",
            ),
            (["buffers"], ["norm.running_mean", 3], "'buffers' is no list of names"),
            (["buffers"], ["gone"], "its files lack the buffers .*gone"),
            (["plan"], {"model": 3}, "'plan' is no mapping of texts"),
        ],
        ids=str,
    )
    def test_in_the_state_file(self, program, home, place, value, message):
        record = json.loads((home / "state.json").read_bytes())
        inner = record
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        write(home, {"state.json": as_bytes(record)})
        with pytest.raises(CheckpointError, match=f"checkpoint-3: .*{message}"):
            program.restore(home)

    def test_rows_of_what_has_none(self, home):
        record = json.loads((home / "state.json").read_bytes())
        record["buffers"].remove("norm.num_batches_tracked")
        write(home, {"state.json": as_bytes(record)})
        with pytest.raises(CheckpointError, match=r"norm\.num_batches_tracked is one number, and has no rows"):
            load(home, lambda length: slice(0, 1))

    def test_a_checkpoint_without_weights(self, program, home):
        record = json.loads((home / "manifest.json").read_bytes())
        del record["files"]["model.safetensors"]
        seal(home, record)
        with pytest.raises(CheckpointError, match="lack"):
            program.restore(home)
        with pytest.raises(CheckpointError, match=r"has no .*body\.weight"):
            load_weights(program.init(1), home)

    @pytest.mark.parametrize("text", [b"{}", b"null", b"[]", b'{"version": 1}'])
    def test_showing_a_state_file_that_is_none(self, home, capsys, text):
        write(home, {"state.json": text})
        assert main(["checkpoint", "show", str(home)]) == 2
        assert "state.json" in capsys.readouterr().err

    @pytest.mark.parametrize("time", [math.nan, math.inf, -1e300, 1e300])
    def test_a_time_that_is_none(self, home, capsys, time):
        seal(home, {**json.loads((home / "manifest.json").read_bytes()), "time": time})
        assert main(["checkpoint", "list", str(home)]) == 0
        assert "?" in capsys.readouterr().out

    def test_names_that_a_terminal_would_act_on(self, home, capsys):
        (home / "\x1b[2J").touch()
        (home / os.fsdecode(b"\xff")).touch()
        record = json.loads((home / "manifest.json").read_bytes())
        seal(home, {**record, "metrics": {"\x1b]0;owned\x07": 1.0}})
        for action in ("list", "verify", "show"):
            assert main(["checkpoint", action, str(home)]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\\x1b[2J" in out

    def test_a_directory_that_may_not_be_read(self, home, capsys, monkeypatch):
        def refusing(self):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr("pathlib.Path.iterdir", refusing)
        assert main(["checkpoint", "list", str(home.parent)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("forgather: error: [Errno 13] Permission denied: ")
        assert err.count("\n") == 1
        with pytest.raises(PermissionError):
            main(["checkpoint", "list", str(home.parent), "--debug"])
