"""The revision of the repository that something is in, read without running what the repository brings along."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_SECONDS: Final = 20
_HARMLESS: Final = "filemode symlinks ignorecase precomposeunicode autocrlf eol checkstat trustctime"
"""Settings of a repository, under ``core``, that say how files are compared, and run nothing."""


def git_state(folder: Path) -> dict[str, Any] | None:
    """Tell the revision of the repository that a folder is in, and whether anything in it was changed.

    A repository's own settings can name programs that ``git status`` runs (``core.fsmonitor``, filters, what fetches
    missing objects), and whoever unpacks an archive has not chosen them. So git compares with a directory of its own,
    which refers to the repository's objects and index, and has none of those settings; the user's own are used. What
    was changed inside of submodules is not looked at.

    Returns:
        ``revision``, and ``dirty``: None where that cannot be told. None outside of a repository.
    """
    try:
        asked = ("HEAD", "--path-format=absolute", "--git-dir", "--git-common-dir", "--show-toplevel")
        revision, *places = _git(folder, "rev-parse", *asked).splitlines()
        repository, common, top = map(Path, places)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    try:
        return {"revision": revision, "dirty": _is_changed(revision, repository, common, top)}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {"revision": revision, "dirty": None}


def _is_changed(revision: str, repository: Path, common: Path, top: Path) -> bool:
    """Compare the files below ``top`` with the index and the revision."""
    with tempfile.TemporaryDirectory() as own:
        (Path(own) / "HEAD").write_text(f"{revision}\n")
        (Path(own) / "refs").mkdir()
        (Path(own) / "info").symlink_to(common / "info")  # which files are ignored
        hashes = "sha1" if len(revision) == 40 else "sha256"
        (Path(own) / "config").write_text(
            f"[core]\nrepositoryformatversion = 1\n[extensions]\nobjectFormat = {hashes}\n"
        )
        changes = _git(
            top,
            *_settings(common),
            *("-c", "core.fsmonitor=false", "status", "--porcelain", "--ignore-submodules=dirty"),
            GIT_DIR=own,
            GIT_WORK_TREE=str(top),
            GIT_INDEX_FILE=str(repository / "index"),
            GIT_OBJECT_DIRECTORY=str(common / "objects"),
        )
    return bool(changes.strip())


def _settings(common: Path) -> Iterator[str]:
    """Give those of the repository's settings that run nothing, as options of git."""
    pattern = f"^core\\.({_HARMLESS.replace(' ', '|')})$"
    listed = subprocess.run(
        ["git", "config", "--file", str(common / "config"), "--no-includes", "--null", "--get-regexp", pattern],
        capture_output=True,
        text=True,
        check=False,  # where there are none, the exit code is 1
        timeout=_SECONDS,
    )
    for one in filter(None, listed.stdout.split("\0")):
        name, equals, value = one.partition("\n")
        yield from ("-c", f"{name}={value}" if equals else name)


def _git(folder: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=_SECONDS,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", **environment},
    )
    return done.stdout
