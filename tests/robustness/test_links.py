"""Links and pipes that someone has laid into a run: nothing outside is touched, and nothing is waited for."""

import errno
import json
import os
import shutil

import pytest

from forgather_fn.checkpoint import CheckpointError, list_checkpoints, load, save, verify
from forgather_fn.checkpoint.catalog import latest
from forgather_fn.checkpoint.commit import open_session, rotate
from forgather_fn.checkpoint.lock import locked
from forgather_fn.checkpoint.rotation import Policy
from tests.checkpoint.faults import content, names
from tests.checkpoint.subjects import small, trajectory


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def program():
    made = small()
    made.init(0)
    return made


@pytest.fixture
def elsewhere(tmp_path):
    """A folder that is no business of the run's."""
    place = tmp_path / "elsewhere"
    (place / "deeper").mkdir(parents=True)
    (place / "thesis").write_text("years of work")
    (place / "deeper" / "data").write_text("more")
    return place


class TestALink:
    @pytest.mark.parametrize("name", [".tmp-checkpoint-3-0a", ".trash-checkpoint-0-0a"])
    def test_among_what_a_save_left_is_removed_and_not_followed(self, program, tmp_path, elsewhere, name):
        before = content(elsewhere)
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name).symlink_to(elsewhere)
        save(program, trajectory()[2], tmp_path / "run")
        assert content(elsewhere) == before
        assert not (tmp_path / "run" / "checkpoints" / name).is_symlink()

    def test_in_what_a_save_left_is_removed_and_not_followed(self, program, tmp_path, elsewhere):
        before = content(elsewhere)
        left = tmp_path / "run" / "checkpoints" / ".tmp-checkpoint-3-0a"
        left.mkdir(parents=True)
        (left / "way").symlink_to(elsewhere)
        save(program, trajectory()[2], tmp_path / "run")
        assert content(elsewhere) == before
        assert not left.exists()

    def test_in_place_of_a_checkpoint_is_rotated_and_what_it_leads_to_stays(self, program, tmp_path):
        theirs = save(program, trajectory()[1], tmp_path / "theirs")
        before = content(theirs)
        home = tmp_path / "run" / "checkpoints"
        home.mkdir(parents=True)
        (home / "checkpoint-1").symlink_to(theirs)
        assert [entry.step for entry in list_checkpoints(tmp_path / "run")] == [1]
        save(program, trajectory()[2], tmp_path / "run")
        rotate(home, Policy(keep=1))
        assert [entry.step for entry in list_checkpoints(tmp_path / "run")] == [2]
        assert content(theirs) == before

    def test_in_place_of_the_checkpoint_that_is_saved_is_replaced(self, program, tmp_path):
        theirs = save(program, trajectory()[1], tmp_path / "theirs")
        before = content(theirs)
        home = tmp_path / "run" / "checkpoints"
        home.mkdir(parents=True)
        (home / "checkpoint-1").symlink_to(theirs)
        save(program, trajectory()[1], tmp_path / "run")
        assert not (home / "checkpoint-1").is_symlink()
        assert content(theirs) == before

    def test_to_nothing_in_place_of_the_checkpoint_that_is_saved_loses_nothing(self, program, tmp_path):
        save(program, trajectory()[1], tmp_path)
        (tmp_path / "checkpoints" / "checkpoint-2").symlink_to(tmp_path / "nothing")
        save(program, trajectory()[2], tmp_path)
        found = latest(tmp_path)
        assert found is not None
        assert found.step == 2

    def test_in_place_of_the_lock_is_not_written_through(self, tmp_path, elsewhere):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").symlink_to(elsewhere / "thesis")
        with pytest.raises(OSError, match=r"\.lock") as caught, locked(tmp_path / "run"):
            pass
        assert caught.value.errno == errno.ELOOP
        assert (elsewhere / "thesis").read_text() == "years of work"

    def test_to_checkpoints_on_another_disk_is_followed(self, program, tmp_path, elsewhere):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
        home = save(program, trajectory()[2], tmp_path / "run")
        assert load(tmp_path / "run").path == home
        open_session(tmp_path / "run")
        assert (elsewhere / "thesis").read_text() == "years of work"


def test_a_file_in_place_of_the_checkpoint_that_is_saved_stays(program, tmp_path):
    save(program, trajectory()[1], tmp_path)
    mine = tmp_path / "checkpoints" / "checkpoint-2"
    mine.write_text("years of work")
    with pytest.raises(NotADirectoryError, match="checkpoint-2"):
        save(program, trajectory()[2], tmp_path)
    assert mine.read_text() == "years of work"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


class TestAPipe:
    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("file", ["manifest.json", "state.json", "model.safetensors"])
    def test_in_place_of_a_file_is_not_waited_for(self, program, tmp_path, file):
        home = save(program, trajectory()[2], tmp_path)
        (home / file).unlink()
        os.mkfifo(home / file)
        assert latest(tmp_path) is None
        assert verify(home) != []
        with pytest.raises(CheckpointError, match=file):
            load(home)

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("file", ["trainer_state.json", "model.safetensors", "model.safetensors.index.json"])
    def test_in_a_checkpoint_of_another_tool_is_not_waited_for(self, program, tmp_path, file):
        home = tmp_path / "checkpoint-7"
        home.mkdir()
        (home / "trainer_state.json").write_text(json.dumps({}))
        shutil.copy(save(program, trajectory()[2], tmp_path / "own") / "model.safetensors", home)
        (home / file).unlink(missing_ok=True)
        os.mkfifo(home / file)
        assert latest(tmp_path) is None

    @pytest.mark.timeout(20)
    def test_in_place_of_the_lock_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / ".lock")
        with pytest.raises(OSError), locked(tmp_path):
            pass
