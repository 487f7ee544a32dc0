import errno
import itertools
import logging
import os
from pathlib import Path

import pytest
import torch

from forgather_fn.checkpoint import commit, latest, list_checkpoints, save, system
from forgather_fn.checkpoint import manifest as manifests
from forgather_fn.checkpoint.snapshot import Memory, snapshot
from tests.checkpoint.faults import Calls, at, content, failing, names
from tests.checkpoint.subjects import BATCHES, small, trajectory
from tests.toys import assert_equal

MAY_FAIL = {"unlink", "remove_directory"}


@pytest.fixture(scope="module")
def program():
    made = small()
    made.init(0)
    return made


@pytest.fixture
def system_calls(monkeypatch):
    """Record what the operating system itself is asked for, in order: ``(call, path)``."""
    events, files = [], {}

    def opened(path, flags, *args, original=os.open):
        file = original(path, flags, *args)
        files[file] = Path(path)
        if flags & os.O_CREAT:
            events.append(("create", Path(path)))
        return file

    def recording(name, original):
        def call(path, *args):
            events.append((name, Path(path)))
            return original(path, *args)

        return call

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda file: events.append(("fsync", files[file])))
    for name in ("rename", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, recording(name, getattr(os, name)))
    return events


class TestTheOrder:
    def test_files_then_manifest_then_directory_then_rename_then_parent(self, program, tmp_path, system_calls):
        home = save(program, trajectory()[2], tmp_path)
        temporary = next(path for name, path in system_calls if name == "rename")
        commits = [event for event in system_calls if temporary in (event[1], event[1].parent)]
        tail = system_calls[system_calls.index(("rename", temporary)) + 1 :]
        files = sorted(path.name for path in home.iterdir() if path.name != "manifest.json")
        assert commits[0] == ("mkdir", temporary)
        assert sorted(path.name for name, path in commits[1:-4]) == sorted(files * 2)
        for name in files:
            assert commits.index(("create", temporary / name)) < commits.index(("fsync", temporary / name))
        assert commits[-4:] == [
            ("create", temporary / "manifest.json"),
            ("fsync", temporary / "manifest.json"),
            ("fsync", temporary),
            ("rename", temporary),
        ]
        assert tail == [("fsync", home.parent)]

    def test_directories_are_on_the_disk_before_what_is_in_them(self, program, tmp_path, system_calls):
        save(program, trajectory()[2], tmp_path / "a" / "b")
        for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "checkpoints"):
            made = system_calls.index(("mkdir", path))
            assert system_calls[made + 1] == ("fsync", path.parent)

    def test_a_directory_is_renamed_and_the_rename_synced_before_it_is_removed(self, program, tmp_path, system_calls):
        home = save(program, trajectory()[2], tmp_path)
        system_calls.clear()
        commit.discard(home)
        (_, old), synced, *removals, last = system_calls
        assert (old, synced) == (home, ("fsync", home.parent))
        assert {name for name, _ in removals} == {"unlink"}
        assert last[0] == "rmdir"

    def test_nothing_that_was_committed_is_written_to_again(self, program, tmp_path):
        save(program, trajectory()[2], tmp_path)
        before = content(tmp_path / "checkpoints")
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
        with Calls().watched() as calls:
            save(program, trajectory()[4], tmp_path)
        assert not [call for call in calls.made if "checkpoint-2" in str(call.path)]
        after = content(tmp_path / "checkpoints")
        assert {name: after[name] for name in before} == before
        assert {path: path.stat().st_mtime_ns for path in times} == times


class TestTheManifest:
    def test_counts_the_commits_and_names_run_and_attempt(self, program, tmp_path):
        for step in (2, 6, 4):
            save(program, trajectory()[step], tmp_path)
        found = [entry.manifest for entry in list_checkpoints(tmp_path)]
        assert [(m.step, m.order) for m in found] == [(2, 0), (6, 1), (4, 2)]
        assert len({m.run for m in found}) == 1
        assert len({m.attempt for m in found}) == 3

    def test_the_count_goes_on_where_older_ones_were_removed(self, program, tmp_path):
        for step in (2, 4, 6):
            home = save(program, trajectory()[step], tmp_path)
            for entry in list_checkpoints(tmp_path)[:-1]:
                commit.discard(entry.path)
        assert manifests.read(home).order == 2

    def test_two_runs_have_two_ids(self, program, tmp_path):
        homes = [save(program, trajectory()[2], tmp_path / name) for name in "ab"]
        assert len({manifests.read(home).run for home in homes}) == 2

    @pytest.mark.parametrize("pinned", [True, False])
    def test_pinned(self, program, tmp_path, pinned):
        home = save(program, trajectory()[2], tmp_path, pinned=pinned)
        assert manifests.read(home).pinned is pinned

    def test_sizes_and_hashes_are_those_of_the_files(self, program, tmp_path):
        home = save(program, trajectory()[2], tmp_path)
        manifest = manifests.read(home)
        assert manifests.hash_faults(home, manifest) == []
        assert set(manifest.files) | {"manifest.json"} == {path.name for path in home.iterdir()}


class TestTheSpace:
    def test_is_compared_with_what_is_needed_before_anything_is_written(self, program, tmp_path, monkeypatch):
        save(program, trajectory()[2], tmp_path)
        monkeypatch.setattr(system, "free_bytes", lambda path: 1000)
        with (
            Calls().watched() as calls,
            pytest.raises(OSError, match=r"a save needs [\d,]+ bytes, there are 1,000") as error,
        ):
            save(program, trajectory()[4], tmp_path)
        assert error.value.errno == errno.ENOSPC
        assert {call.name for call in calls.made} <= {"sync_directory"}
        assert latest(tmp_path).step == 2

    @pytest.mark.parametrize("tensors", [1, 300])
    def test_what_is_needed_is_not_less_than_what_is_used(self, tmp_path, tensors):
        model = torch.nn.Sequential(*[torch.nn.Linear(5, 5) for _ in range(tensors)])
        program = small(model=model)
        state = program.init(0)
        taken, copy = snapshot(state, program, None, {}, Memory())
        copy()
        home = save(program, state, tmp_path)
        used = sum(path.stat().st_size for path in home.iterdir())
        assert used <= taken.size() <= 3 * used + 100_000


class TestLeftovers:
    LEFT = (".tmp-checkpoint-4-0a1b2c3d", ".trash-checkpoint-0-0a1b2c3d")
    OTHERS = ("notes.txt", "checkpoint-best", ".tmp-other", "checkpoint-4.bak", ".replaced-checkpoint-x")

    def test_of_saves_are_removed_and_nothing_else(self, program, tmp_path):
        directory = tmp_path / "checkpoints"
        for name in (*self.LEFT, *self.OTHERS):
            (directory / name / "deep").mkdir(parents=True)
            (directory / name / "deep" / "file").write_text("mine")
        save(program, trajectory()[2], tmp_path)
        assert set(names(tmp_path)) == {"checkpoint-2", *self.OTHERS}

    def test_a_link_is_removed_and_not_what_it_points_to(self, program, tmp_path):
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").write_text("mine")
        left = tmp_path / "checkpoints" / self.LEFT[0]
        left.mkdir(parents=True)
        (left / "link").symlink_to(outside)
        save(program, trajectory()[2], tmp_path)
        assert names(tmp_path) == ["checkpoint-2"]
        assert (outside / "file").read_text() == "mine"

    def test_one_that_was_moved_aside_comes_back_where_there_is_no_other(self, program, tmp_path):
        home = save(program, trajectory()[2], tmp_path)
        home.rename(home.parent / ".replaced-checkpoint-2-0a1b2c3d")
        assert latest(tmp_path).step == 2
        save(program, trajectory()[4], tmp_path)
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]

    def test_one_that_was_moved_aside_stays_where_the_other_is_damaged(self, program, tmp_path):
        home = save(program, trajectory()[2], tmp_path)
        aside = home.rename(home.parent / ".replaced-checkpoint-2-0a1b2c3d")
        home.mkdir()
        (home / "model.safetensors").write_bytes(b"half")
        commit.sweep(home.parent)
        assert sorted(names(tmp_path)) == sorted([aside.name, home.name])
        assert_equal(program.restore(tmp_path), trajectory()[2])

    @pytest.mark.parametrize("name", LEFT)
    def test_that_cannot_be_removed_are_reported_and_in_nobodys_way(self, program, tmp_path, caplog, name):
        left = tmp_path / "checkpoints" / name
        left.mkdir(parents=True)
        (left / "file").touch()

        def fault(call, perform):
            return failing(errno.EACCES)(call, perform) if call.name in MAY_FAIL else perform()

        with Calls(lambda number: fault).watched(), caplog.at_level(logging.WARNING):
            save(program, trajectory()[2], tmp_path)
        assert latest(tmp_path).step == 2
        assert f"{name} could not be removed" in caplog.text
        save(program, trajectory()[4], tmp_path)
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]

    def test_of_a_replaced_one_that_cannot_be_removed_do_not_fail_the_save(self, program, tmp_path, caplog):
        save(program, trajectory()[2], tmp_path)
        other, _ = program.step(trajectory()[1].copy(), BATCHES[-1])
        with Calls().watched() as calls:
            save(program, other, tmp_path)
        last = max(i for i, call in enumerate(calls.made) if call.name == "unlink")
        with Calls(at(last, failing(errno.EIO))).watched(), caplog.at_level(logging.WARNING):
            save(program, trajectory()[2], tmp_path)
        assert "could not be removed" in caplog.text
        assert_equal(program.restore(tmp_path), trajectory()[2])


def test_only_the_owner_may_read_a_checkpoint(program, tmp_path):
    home = save(program, trajectory()[2], tmp_path)
    assert home.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in home.iterdir()} == {0o600}


def test_files_are_written_side_by_side_and_come_out_the_same(program, tmp_path):
    for run, writers in itertools.product("ab", (1, 2)):
        with Calls().watched(writers=writers):
            save(program, trajectory()[2], tmp_path / f"{run}{writers}")
    files = [{n: (w.size, w.sha256) for n, w in latest(run).manifest.files.items()} for run in tmp_path.iterdir()]
    assert all(one == files[0] for one in files)


def test_a_write_without_progress_is_an_error_and_no_endless_loop(program, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "write", lambda file, data: 0)
    with pytest.raises(OSError, match="no progress"):
        save(program, trajectory()[2], tmp_path)
    assert names(tmp_path) == []


class TestADirectoryThatOthersHaveWritten:
    def test_it_is_synced_then_sealed_then_moved_in(self, tmp_path, system_calls):
        session = commit.open_session(tmp_path)
        temporary = commit.staged(session, 7)
        (temporary / "a.txt").write_text("a")
        (temporary / "deeper").mkdir()
        (temporary / "deeper" / "b.txt").write_text("b")
        del system_calls[:]
        home = commit.seal(session, temporary, step=7, samples=28, metrics={"loss": 0.5})
        assert home.name == "checkpoint-7"
        done = [(name, path.name) for name, path in system_calls]
        rename = done.index(("rename", temporary.name))
        for name in ("a.txt", "b.txt", "deeper"):
            assert ("fsync", name) in done[:rename]
        assert done.index(("create", "manifest.json")) > done.index(("fsync", "a.txt"))
        assert done[rename - 1] == ("fsync", temporary.name)
        assert done[rename + 1] == ("fsync", home.parent.name)
        entry = latest(tmp_path)
        assert (entry.step, entry.manifest.samples, entry.manifest.metrics) == (7, 28, {"loss": 0.5})
        assert list(entry.manifest.files) == ["a.txt"]

    def test_it_has_a_copy_of_how_its_run_was_made(self, tmp_path):
        session = commit.open_session(tmp_path)
        (tmp_path / commit.RECORD).write_text("a record")
        home = commit.seal(session, commit.staged(session, 7), step=7, samples=28)
        assert (home / commit.RECORD).read_text() == "a record"
        assert commit.RECORD in manifests.read(home).files

    def test_what_is_not_sealed_is_swept_away(self, tmp_path):
        session = commit.open_session(tmp_path)
        temporary = commit.staged(session, 7)
        (temporary / "a.txt").write_text("a")
        assert list_checkpoints(tmp_path) == []
        commit.sweep(session.directory)
        assert not temporary.exists()

    def test_a_checkpoint_of_the_step_is_replaced(self, tmp_path):
        session = commit.open_session(tmp_path)
        for text in ("one", "two"):
            temporary = commit.staged(session, 7)
            (temporary / "a.txt").write_text(text)
            home = commit.seal(session, temporary, step=7, samples=28)
        assert (home / "a.txt").read_text() == "two"
        assert len(list_checkpoints(tmp_path)) == 1


def test_each_checkpoint_has_a_copy_of_how_its_run_was_made(program, tmp_path):
    home = save(program, trajectory()[2], tmp_path)
    assert not (home / commit.RECORD).exists()
    (tmp_path / commit.RECORD).write_text("a record")
    home = save(program, trajectory()[3], tmp_path)
    assert (home / commit.RECORD).read_text() == "a record"
    assert commit.RECORD in manifests.read(home).files


def test_a_record_that_cannot_be_one_is_refused(program, tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "RECORD_LIMIT", 3)
    (tmp_path / commit.RECORD).write_text("a record")
    with pytest.raises(ValueError, match="larger than a record"):
        save(program, trajectory()[2], tmp_path)
