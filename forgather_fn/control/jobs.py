"""The jobs of a user: a directory for each that runs, with a file that says how it is reached.

    <state>/forgather/jobs/<id>/endpoint.json     0600, in directories of 0700
    <state>/forgather/jobs/<id>/socket            0600

``<state>`` is ``$XDG_STATE_HOME``, or ``~/.local/state``. A job's directory is made elsewhere and renamed in whole, so
that whoever sees it sees all of it. It may be on a disk that several machines share.
"""

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

from forgather_fn.control.command import JOB_ID, ControlError, checked_id
from forgather_fn.control.endpoint import NAME, Endpoint, UnsafeError, check_directory, read
from forgather_fn.control.process import alive

SOCKET: Final = "socket"
SHORT: Final = "forgather-"
"""What directories begin with that hold a socket whose path in the job's directory would be too long."""

_NEW: Final = ".new-"
_OLD: Final = ".old-"
_GRACE: Final = 3600.0  # seconds for which a directory without an endpoint may be one that is being made


class TakenError(ControlError):
    """Another job took an id first."""


@attrs.frozen
class Job:
    """What lies in the directory of jobs under one id.

    Attributes:
        job: The id.
        endpoint: What its file says; None if that cannot be read.
        running: Whether its process is there; True also where that cannot be told from here.
        fault: Why it must not be used; None if it may.
    """

    job: str
    endpoint: Endpoint | None
    running: bool
    fault: str | None = None


def jobs_directory() -> Path:
    """Name the directory of this user's jobs.

    Raises:
        ControlError: There is no home directory.
    """
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # the specification has relative ones ignored
        try:
            state = str(Path.home() / ".local" / "state")
        except RuntimeError as error:
            raise ControlError(f"there is no place for jobs: {error}; set HOME or XDG_STATE_HOME") from None
    return Path(state) / "forgather" / "jobs"


def make_jobs_directory() -> Path:
    """Make the directory of jobs, for this user alone.

    Raises:
        UnsafeError: It is there, and others can write to it.
        OSError: It cannot be made.
    """
    jobs = jobs_directory()
    jobs.parent.parent.mkdir(parents=True, exist_ok=True)
    for directory in (jobs.parent, jobs):
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        check_directory(directory)
    return jobs


@contextlib.contextmanager
def claimed(jobs: Path, name: str, *, exact: bool) -> Iterator["Claim"]:
    """Make a job's directory: what is put into it in the block is there under its id at the end, whole.

    Args:
        jobs: The directory of jobs.
        name: The id; with ``exact`` false, a number is added where another job that runs has it.
        exact: Whether no other id will do.

    Raises:
        ControlError: The id belongs to a job that runs.
        TakenError: Another job took it at the same time.
        OSError: It cannot be made. Nothing is left behind, however the block ends.
    """
    staging = jobs / f"{_NEW}{secrets.token_hex(4)}"
    staging.mkdir(mode=0o700)
    claim = Claim(staging, _free_id(jobs, name, exact))
    try:
        yield claim
        os.rename(staging, jobs / claim.job)
    except OSError as error:
        _remove(staging)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise TakenError(f"another job has just taken the id {claim.job!r}") from None
        raise
    except BaseException:
        _remove(staging)
        raise


@attrs.frozen
class Claim:
    """A job's directory that is being made.

    Attributes:
        staging: Where it is made.
        job: The id that it will have.
    """

    staging: Path
    job: str

    @property
    def home(self) -> Path:
        """Where it will be."""
        return self.staging.parent / self.job


def _free_id(jobs: Path, name: str, exact: bool) -> str:
    for number in range(1, 2 if exact else 1000):
        job = name if number == 1 else f"{name[:60]}-{number}"
        found = _job(jobs / job)
        if found is None:
            return job
        if not found.running and found.fault is None and remove(found):
            return job
    raise ControlError(f"the id {name!r} belongs to a job that runs, or cannot be cleaned; choose another job_id")


def find(job: str) -> Endpoint:
    """Read how a job is reached.

    Raises:
        UnsafeError: Others could have written it, or it leads to another machine.
        ControlError: There is no such job, or it is dead.
    """
    checked_id(job)
    found = _job(jobs_directory() / job)
    if found is None:
        known = [one.job for one in list_jobs() if one.running]
        raise ControlError(f"there is no job {job!r}; running: {', '.join(known) or 'none'}")
    if found.fault is not None or found.endpoint is None:
        raise UnsafeError(f"the job {job!r} is not used: {found.fault}")
    if not found.running:
        raise ControlError(f"the job {job!r} is dead: its process {found.endpoint.process.pid} has ended")
    if alive(found.endpoint.process) is None:
        raise ControlError(f"the job {job!r} runs on {found.endpoint.process.host}, and is controlled there")
    return found.endpoint


def list_jobs() -> list[Job]:
    """List the jobs of this user, by id; those of other machines count as running."""
    jobs = jobs_directory()
    try:
        names = sorted(os.listdir(jobs))
    except FileNotFoundError:
        return []
    found = (_job(jobs / name) for name in names if JOB_ID.fullmatch(name))
    return [job for job in found if job is not None]


def cleanup() -> list[Job]:
    """Remove what jobs have left that are dead, and nothing else.

    Returns:
        Those that were removed.
    """
    removed = [job for job in list_jobs() if not job.running and job.fault is None and remove(job)]
    _sweep(jobs_directory())
    return removed


def remove(job: Job) -> bool:
    """Remove the directory of a dead job, unless another has taken its place meanwhile; tell whether it is gone."""
    home = jobs_directory() / job.job
    aside = home.with_name(f"{_OLD}{secrets.token_hex(4)}")
    try:
        os.rename(home, aside)
        found = _job(aside)
        if found is not None and found.running:
            os.rename(aside, home)
            return False
        release(aside, found.endpoint.socket if found and found.endpoint else None)
    except OSError:
        return False
    return True


def release(directory: Path, socket: str | None) -> None:
    """Remove a job's directory, and its socket wherever that is."""
    if socket is not None and Path(socket).parent.name.startswith(SHORT):
        short = Path(socket).parent
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.lstat(socket).st_mode) and os.lstat(short).st_uid == os.geteuid():
                os.unlink(socket)
                os.rmdir(short)
    _remove(directory)


def _remove(directory: Path) -> None:
    """Remove what a job's directory may hold, and it; what is something else stays."""
    for name in (NAME, SOCKET):
        with contextlib.suppress(OSError):
            os.unlink(directory / name)
    with contextlib.suppress(OSError):
        os.rmdir(directory)


def _sweep(jobs: Path) -> None:
    """Remove directories that were being made, or removed, by processes that did not get to the end of it."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(jobs)):
            found = _job(jobs / entry.name) if entry.name.startswith((_NEW, _OLD)) else None
            if found is None or found.running:
                continue
            if found.endpoint is not None or time.time() - entry.stat(follow_symlinks=False).st_mtime > _GRACE:
                release(jobs / entry.name, found.endpoint.socket if found.endpoint else None)


def _job(directory: Path) -> Job | None:
    """Look at one directory; None if there is none."""
    try:
        check_directory(directory.parent)
        check_directory(directory)
        endpoint = read(directory)
    except (FileNotFoundError, NotADirectoryError):
        return Job(directory.name, None, False) if directory.is_dir() else None
    except UnsafeError as error:
        return Job(directory.name, None, True, str(error))
    except OSError as error:
        return Job(directory.name, None, True, f"{error.strerror}: {error.filename}")
    return Job(directory.name, endpoint, alive(endpoint.process) is not False)
