import hashlib
import logging
import os
import re
import shutil

import attrs
import pytest
import torch
from safetensors.torch import save_file

from forgather_fn.checkpoint import catalog, latest, list_checkpoints, load, save, system, verify
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.hashing import Written
from forgather_fn.checkpoint.manifest import Manifest, dump
from tests.checkpoint.subjects import small, trajectory

HOUR = 3600
NOW = 1_700_000_000


def made(run, step, *, order=0, time=0.0, modified=None, files=None, name=None, **fields):
    """Write a checkpoint with any content."""
    home = run / "checkpoints" / (name or f"checkpoint-{step}")
    home.mkdir(parents=True)
    held = {"state.json": b"{}"} if files is None else files
    written = {}
    for file, data in held.items():
        (home / file).write_bytes(data)
        written[file] = Written(len(data), hashlib.sha256(data).hexdigest())
    manifest = Manifest(
        step=step, samples=4 * step, order=order, run="a", attempt="b", time=NOW + time, files=written, **fields
    )
    (home / "manifest.json").write_bytes(dump(manifest))
    return dated(home, time if modified is None else modified)


def dated(path, time):
    os.utime(path, (NOW + time, NOW + time))
    return path


def foreign(run, step, *, time, weights=None, state=b"{}"):
    """Write what transformers.Trainer leaves, whole or not."""
    home = run / "checkpoints" / f"checkpoint-{step}"
    home.mkdir(parents=True)
    if state is not None:
        (home / "trainer_state.json").write_bytes(state)
    save_file({"weight": torch.arange(6.0)}, home / "model.safetensors")
    if weights is not None:
        data = (home / "model.safetensors").read_bytes()
        (home / "model.safetensors").write_bytes(weights(data))
    return dated(home, time)


def steps(run):
    return [entry.step for entry in list_checkpoints(run)]


class TestOrder:
    def test_is_that_of_the_commits_and_not_of_steps_or_times(self, tmp_path):
        made(tmp_path, 30, order=0, time=3 * HOUR)
        made(tmp_path, 20, order=2, time=HOUR)
        made(tmp_path, 10, order=1, time=2 * HOUR)
        assert steps(tmp_path) == [30, 10, 20]
        assert latest(tmp_path).step == 20

    def test_of_a_run_that_went_back(self, tmp_path):
        program = small()
        program.init(0)
        for step in (2, 6, 4):
            save(program, trajectory()[step], tmp_path)
        assert steps(tmp_path) == [2, 6, 4]
        assert load(tmp_path).record["step"] == latest(tmp_path).step == 4

    def test_a_copy_that_changed_file_times_is_not_misread(self, tmp_path):
        made(tmp_path / "a", 1, order=0, time=0)
        made(tmp_path / "a", 2, order=1, time=1)
        copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
        dated(copy / "checkpoints" / "checkpoint-1", 9 * HOUR)
        dated(copy / "checkpoints" / "checkpoint-2", 8 * HOUR)
        assert latest(copy).step == 2

    def test_of_other_tools_is_that_of_modification(self, tmp_path):
        foreign(tmp_path, 300, time=0)
        foreign(tmp_path, 100, time=2 * HOUR)
        foreign(tmp_path, 200, time=HOUR)
        assert steps(tmp_path) == [300, 200, 100]

    def test_of_other_tools_among_our_own(self, tmp_path):
        made(tmp_path, 1, order=0, time=HOUR, modified=5 * HOUR)
        made(tmp_path, 2, order=1, time=3 * HOUR, modified=0)
        foreign(tmp_path, 10, time=0)
        foreign(tmp_path, 20, time=2 * HOUR)
        foreign(tmp_path, 30, time=4 * HOUR)
        foreign(tmp_path, 31, time=4 * HOUR)
        assert steps(tmp_path) == [10, 1, 20, 2, 30, 31]

    def test_one_whose_manifest_cannot_be_read_may_be_the_newest(self, tmp_path, caplog):
        made(tmp_path, 1, order=0)
        broken = made(tmp_path, 3, order=2, modified=-HOUR)
        made(tmp_path, 2, order=1)
        (broken / "manifest.json").write_bytes(b"\0" * 300)
        assert steps(tmp_path) == [1, 2, 3]
        with caplog.at_level(logging.WARNING):
            assert latest(tmp_path).step == 2
        assert "checkpoint-3 is passed over" in caplog.text


class TestWhatIsThere:
    @pytest.mark.parametrize("name", ["checkpoint-", "checkpoint-x", "checkpoint-3.tmp", "Checkpoint-3", "x", "tmp-3"])
    def test_other_names_are_no_checkpoints(self, tmp_path, name):
        made(tmp_path, 3, name=name)
        (tmp_path / "checkpoints" / "checkpoint-7").write_text("a file")
        assert list_checkpoints(tmp_path) == []

    @pytest.mark.parametrize("name", [".tmp-checkpoint-3-0a1b", ".trash-checkpoint-0-0a1b"])
    def test_what_a_save_leaves_is_no_checkpoint(self, tmp_path, name):
        made(tmp_path, 3, name=name)
        assert latest(tmp_path) is None

    def test_one_that_was_moved_aside_is(self, tmp_path):
        made(tmp_path, 3, name=".replaced-checkpoint-3-0a1b")
        assert (latest(tmp_path).step, latest(tmp_path).whole) == (3, True)

    @pytest.mark.parametrize("where", ["run", "run/checkpoints"])
    def test_a_run_is_found_by_either_directory(self, tmp_path, where):
        made(tmp_path / "run", 3)
        assert steps(tmp_path / where) == [3]

    @pytest.mark.parametrize("where", ["nowhere", "file", "empty"])
    def test_of_nothing_there_is_nothing(self, tmp_path, where):
        (tmp_path / "file").write_text("x")
        (tmp_path / "empty").mkdir()
        assert list_checkpoints(tmp_path / where) == []
        assert latest(tmp_path / where) is None

    def test_one_that_is_being_removed_while_one_looks(self, tmp_path, monkeypatch):
        """Another process rotates: each look may find less than the one before."""
        made(tmp_path, 1)
        made(tmp_path, 2, order=1)
        read = manifests.read

        def reading(path):
            found = read(path)
            if path.name == "checkpoint-1":
                shutil.rmtree(path)
            return found

        monkeypatch.setattr(manifests, "read", reading)
        assert latest(tmp_path).step == 2
        foreign(tmp_path, 3, time=0)
        monkeypatch.setattr(manifests, "read", lambda path: shutil.rmtree(path) if path.name[-1] == "3" else read(path))
        assert latest(tmp_path).step == 2


class TestWhole:
    def test_means_that_every_file_is_there_with_its_size(self, tmp_path):
        home = made(tmp_path, 1, files={"state.json": b"{}", "model.safetensors": b"1234"})
        assert list_checkpoints(tmp_path)[0].whole
        (home / "model.safetensors").write_bytes(b"123")
        assert list_checkpoints(tmp_path)[0].faults == ("model.safetensors has 3 bytes instead of 4",)
        (home / "model.safetensors").unlink()
        assert list_checkpoints(tmp_path)[0].faults == ("model.safetensors is missing",)

    def test_what_was_added_does_not_matter_and_is_named(self, tmp_path):
        home = made(tmp_path, 1)
        (home / "notes.txt").write_text("good one")
        entry = list_checkpoints(tmp_path)[0]
        assert entry.whole
        assert catalog.added(entry) == ["notes.txt"]

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            ({"state": None}, "no manifest and no trainer_state.json"),
            ({"state": b""}, "no trainer_state.json that can be read"),
            ({"state": b'{"global_step": 1'}, "no trainer_state.json that can be read"),
            ({"state": b"[" * 100_000}, "no trainer_state.json that can be read"),
            ({"weights": lambda data: b""}, "model.safetensors has no header that can be read"),
            ({"weights": lambda data: data[:-1]}, "model.safetensors has .* bytes instead of"),
            ({"weights": lambda data: data + b"\0"}, "model.safetensors has .* bytes instead of"),
            ({"weights": lambda data: data[:20]}, "model.safetensors is cut short"),
            ({"weights": lambda data: b"\0" * len(data)}, "model.safetensors"),
            ({"weights": lambda data: b"\xff" * len(data)}, "model.safetensors"),
        ],
    )
    def test_of_another_tool_as_far_as_its_files_tell(self, tmp_path, damage, reason, caplog):
        foreign(tmp_path, 5, time=0)
        foreign(tmp_path, 10, time=HOUR, **damage)
        with caplog.at_level(logging.WARNING):
            assert latest(tmp_path).step == 5
        assert "checkpoint-10 is passed over" in caplog.text
        (fault,) = list_checkpoints(tmp_path)[-1].faults
        assert re.search(reason, fault)

    @pytest.mark.parametrize(
        ("index", "whole"),
        [
            (b'{"weight_map": {"weight": "model.safetensors"}}', True),
            (b'{"weight_map": {"weight": "model-00001-of-00002.safetensors"}}', False),
            (b'{"weight_map": {"weight": "model.safetensors", "b": "gone"}}', False),
            *((text, False) for text in (b"{}", b"[]", b"3", b"", b'{"weight_map": {"a": 3}}', b'{"weight_map": [1]}')),
            (b'{"weight_map": {"a": [1]}}', False),
        ],
    )
    def test_of_another_tool_with_an_index(self, tmp_path, index, whole):
        home = foreign(tmp_path, 5, time=0)
        (home / "model.safetensors.index.json").write_bytes(index)
        assert list_checkpoints(tmp_path)[0].whole is whole

    def test_an_empty_directory_is_not(self, tmp_path, caplog):
        made(tmp_path, 1)
        (tmp_path / "checkpoints" / "checkpoint-2").mkdir()
        with caplog.at_level(logging.WARNING):
            assert latest(tmp_path).step == 1
        assert "checkpoint-2 is passed over: it has no manifest" in caplog.text

    def test_the_newest_is_taken_without_a_word(self, tmp_path, caplog):
        made(tmp_path, 1)
        (tmp_path / "checkpoints" / "checkpoint-0").mkdir()
        dated(tmp_path / "checkpoints" / "checkpoint-0", -HOUR)
        with caplog.at_level(logging.WARNING):
            assert latest(tmp_path).step == 1
        assert caplog.text == ""


class TestVerify:
    def test_reads_every_byte(self, tmp_path):
        home = made(tmp_path, 1, files={"state.json": b"{}", "model.safetensors": b"1234"})
        assert verify(home) == []
        (home / "model.safetensors").write_bytes(b"1235")
        assert list_checkpoints(tmp_path)[0].whole
        assert verify(home) == ["model.safetensors: its content was changed (sha256 differs)"]

    def test_says_that_there_is_no_manifest(self, tmp_path):
        assert verify(tmp_path) == ["it has no manifest: the save did not end"]

    def test_says_that_the_manifest_is_damaged(self, tmp_path):
        home = made(tmp_path, 1)
        (home / "manifest.json").write_bytes(b"{")
        (fault,) = verify(home)
        assert "is not a manifest" in fault

    def test_says_that_a_file_cannot_be_read(self, tmp_path, monkeypatch):
        home = made(tmp_path, 1)

        def unreadable(path, read_file=system.read_file):
            if path.name == "state.json":
                raise OSError(5, "Input/output error")
            return read_file(path)

        monkeypatch.setattr(system, "read_file", unreadable)
        assert verify(home) == ["state.json cannot be read: Input/output error"]


def test_an_entry_is_data(tmp_path):
    made(tmp_path, 1, metrics={"eval_loss": 0.5})
    entry = list_checkpoints(tmp_path)[0]
    assert attrs.evolve(entry, faults=("x",)).whole is False
    assert entry.manifest.metrics == {"eval_loss": 0.5}
