"""The revision of a repository: told as git tells it, and nothing that the repository brings along runs."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from forgather_fn.config import parse
from forgather_fn.config.git import git_state
from forgather_fn.config.record import record_of

Git = Callable[..., None]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Make a repository with one file in a folder, committed."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    home = tmp_path / "repository"
    (home / "folder").mkdir(parents=True)
    (home / "folder/file").write_text("text\n")
    git = git_in(home)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    return home


def git_in(home: Path) -> Git:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=b", "-c", "protocol.file.allow=always")
        subprocess.run(["git", *who, *arguments], cwd=home, check=True, capture_output=True)

    return git


def dirty(folder: Path) -> object:
    found = git_state(folder)
    assert found is not None
    assert len(found["revision"]) == 40
    return found["dirty"]


def test_the_state_of_a_repository(repository, tmp_path):
    assert git_state(tmp_path) is None
    assert dirty(repository) is False
    assert dirty(repository / "folder") is False
    (repository / "new").touch()
    assert dirty(repository) is True
    assert dirty(repository / "folder") is True
    (repository / "new").unlink()
    (repository / "folder/file").write_text("other\n")
    assert dirty(repository) is True
    git_in(repository)("add", ".")
    assert dirty(repository) is True
    git_in(repository)("commit", "-q", "-m", "y")
    assert dirty(repository) is False


def test_a_repository_without_a_commit_has_no_revision(tmp_path):
    git_in(tmp_path)("init", "-q")
    assert git_state(tmp_path) is None


def test_what_is_ignored_or_of_another_mode_by_settings_is_no_change(repository):
    (repository / "log").touch()
    (repository / ".git/info/exclude").write_text("log\n")
    assert dirty(repository) is False
    os.chmod(repository / "folder/file", 0o755)
    assert dirty(repository) is True
    git_in(repository)("config", "core.fileMode", "false")
    assert dirty(repository) is False


def test_a_second_working_tree_is_compared_with_its_own_index(repository, tmp_path):
    git_in(repository)("worktree", "add", "-q", str(tmp_path / "second"))
    (repository / "new").touch()
    assert dirty(tmp_path / "second") is False
    (tmp_path / "second/folder/file").write_text("other\n")
    assert dirty(tmp_path / "second") is True


def test_a_repository_of_longer_hashes(tmp_path):
    git = git_in(tmp_path)
    git("init", "-q", "--object-format=sha256")
    git("commit", "-q", "--allow-empty", "-m", "x")
    found = git_state(tmp_path)
    assert found is not None
    assert (len(found["revision"]), found["dirty"]) == (64, False)


def test_what_cannot_be_compared_is_not_called_clean(repository):
    (repository / ".git/index").write_bytes(b"damaged")
    assert dirty(repository) is None


def watched_files(git: Git, home: Path, script: str) -> None:
    git("config", "core.fsmonitor", script)


def filtered(git: Git, home: Path, script: str) -> None:
    git("config", "filter.a=b.clean", script)
    (home / ".git/info/attributes").write_text("file filter=a=b\n")


def filtered_by_a_process(git: Git, home: Path, script: str) -> None:
    git("config", "filter.x.process", script)
    (home / ".gitattributes").write_text("file filter=x\n")


def included(git: Git, home: Path, script: str) -> None:
    (home / "more").write_text(f"[core]\n    fsmonitor = {script}\n    hooksPath = {Path(script).parent}\n")
    git("config", "include.path", str(home / "more"))


def fetched(git: Git, home: Path, script: str) -> None:
    """What is missing is fetched when it is asked for, by a program that the settings name."""
    git("config", "extensions.partialClone", "origin")
    git("config", "remote.origin.promisor", "true")
    git("config", "remote.origin.url", str(home))
    git("config", "remote.origin.uploadpack", script)
    for one in (home / ".git/objects").iterdir():
        for loose in one.iterdir():
            kind = subprocess.run(
                ["git", "cat-file", "-t", one.name + loose.name], cwd=home, check=True, capture_output=True
            )
            if kind.stdout == b"tree\n":
                loose.unlink()


def inside_of_a_submodule(git: Git, home: Path, script: str) -> None:
    other = home.parent / "other"
    shutil.copytree(home, other)
    git("submodule", "add", "-q", str(other), "below")
    git("commit", "-q", "-m", "y")
    git_in(home / "below")("config", "core.fsmonitor", script)
    git_in(home / "below")("config", "filter.x.clean", script)
    (home / "below/.gitattributes").write_text("file filter=x\n")
    os.utime(home / "below/folder/file", (1, 1))


PLANTS = (watched_files, filtered, filtered_by_a_process, included, fetched, inside_of_a_submodule)


@pytest.mark.parametrize("plant", PLANTS)
def test_nothing_runs_that_a_repository_brings_along(repository, tmp_path, plant):
    """``git status`` would run each of these."""
    ran = tmp_path / "ran"
    script = tmp_path / "hooks/post-index-change"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {ran}\nexit 1\n")
    script.chmod(0o755)
    plant(git_in(repository), repository, str(script))
    os.utime(repository / "folder/file", (1, 1))  # so that its content is looked at
    graph = parse("main: 1")
    record = record_of(
        "main: 1", graph, config="c", variables={}, overrides={}, command=[], folder=repository / "folder"
    )
    assert not ran.exists()
    assert record.git is not None
    assert len(record.git["revision"]) == 40
