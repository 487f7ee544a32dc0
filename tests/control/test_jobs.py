import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from forgather_fn.control import ControlError, jobs
from forgather_fn.control import endpoint as endpoints
from forgather_fn.control.endpoint import Endpoint, UnsafeError
from forgather_fn.control.process import alive, this_process


@pytest.fixture
def directory():
    return jobs.make_jobs_directory()


def made(directory, job="a", **changes):
    """Write the endpoint of a job; of this process, unless changed."""
    fields = {"job": job, "run": "/runs/a", "since": 1.0, "process": this_process(), "socket": "/nowhere/socket"}
    endpoint = Endpoint(**fields | changes)
    with jobs.claimed(directory, job, exact=True) as claim:
        endpoints.write(claim.staging, endpoint)
    return endpoint


def edited(directory, **changes):
    """Change what the file of the job "a" says."""
    path = directory / "a" / "endpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def ended():
    """A process that is no more."""
    child = subprocess.Popen(["true"])
    process = attrs.evolve(this_process(), pid=child.pid, started=1)
    child.wait()
    return process


class TestEndpoint:
    def test_what_is_written_is_read(self, directory):
        endpoint = made(directory)
        assert jobs.find("a") == endpoint
        assert [(one.job, one.running) for one in jobs.list_jobs()] == [("a", True)]

    def test_only_the_user_can_read_it(self, directory):
        previous = os.umask(0)
        try:
            made(directory)
        finally:
            os.umask(previous)
        modes = [
            stat.S_IMODE(path.stat().st_mode)
            for path in (directory, directory / "a", directory / "a" / "endpoint.json")
        ]
        assert modes == [0o700, 0o700, 0o600]

    def test_a_job_is_there_whole_or_not_at_all(self, directory, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            made(directory)
        assert list(directory.iterdir()) == []

    @pytest.mark.parametrize(
        "job", ["", "..", "../a", "a/b", ".hidden", "-x", "a" * 65, "a\n", "a b", "ä", "a\0", "/etc"]
    )
    def test_an_id_is_a_name_and_no_path(self, directory, job):
        with pytest.raises(ControlError, match="is no id of a job"):
            jobs.find(job)
        made(directory)
        edited(directory, job=job)
        with pytest.raises(UnsafeError, match="is no id of a job"):
            jobs.find("a")

    def test_there_is_no_such_job(self, directory):
        made(directory)
        with pytest.raises(ControlError, match="there is no job 'b'; running: a"):
            jobs.find("b")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"address": "10.0.0.1", "port": 80, "socket": None}, "10.0.0.1 is not of this machine"),
            ({"address": "example.com", "port": 80, "socket": None}, "does not appear to be an IPv4"),
            ({"address": "0.0.0.0", "port": 80, "socket": None}, "0.0.0.0 is not of this machine"),
            ({"address": "127.0.0.1", "socket": None}, "expected a socket, or an address and a port"),
            ({"socket": None}, "expected a socket"),
            ({"pid": "1"}, "pid is '1'"),
            ({"pid": True}, "pid is True"),
            ({"socket": 7}, "socket is 7"),
            ({"since": "x"}, "since is 'x'"),
        ],
    )
    def test_what_leads_elsewhere_is_refused(self, directory, changes, message):
        made(directory)
        edited(directory, **changes)
        with pytest.raises(UnsafeError, match=message):
            jobs.find("a")

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 10**5])
    def test_what_is_no_endpoint_is_refused(self, directory, text):
        made(directory)
        (directory / "a" / "endpoint.json").write_text(text)
        with pytest.raises(UnsafeError, match=r"does not say how a job is reached|no file of at most"):
            jobs.find("a")


class TestFilesOfOthers:
    @pytest.mark.parametrize("mode", [0o620, 0o602, 0o640, 0o604, 0o666])
    def test_a_file_that_others_can_read_or_write_is_refused(self, directory, mode):
        made(directory)
        (directory / "a" / "endpoint.json").chmod(mode)
        with pytest.raises(UnsafeError, match=f"has mode {mode:04o}"):
            jobs.find("a")

    @pytest.mark.parametrize("place", [".", "a"])
    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
    def test_a_directory_that_others_can_write_to_is_refused(self, directory, place, mode):
        made(directory)
        (directory / place).chmod(mode)
        with pytest.raises(UnsafeError, match=f"has mode {mode:04o}"):
            jobs.find("a")

    @pytest.mark.parametrize("place", [".", "a", "a/endpoint.json"])
    def test_what_belongs_to_another_user_is_refused(self, directory, place, monkeypatch):
        made(directory)
        foreign = (directory / place).stat().st_ino
        for name in ("lstat", "fstat"):
            real = getattr(os, name)

            def changed(*args, real=real, **kwargs):
                found = real(*args, **kwargs)
                fields = list(found)
                if found.st_ino == foreign:
                    fields[4] = 12345
                return os.stat_result(fields)

            monkeypatch.setattr(os, name, changed)
        with pytest.raises(UnsafeError, match="belongs to user 12345"):
            jobs.find("a")

    def test_a_link_is_refused(self, directory, tmp_path):
        made(directory)
        (directory / "b").symlink_to(directory / "a")
        with pytest.raises(UnsafeError, match="is no directory"):
            jobs.find("b")
        elsewhere = tmp_path / "planted.json"
        (directory / "a" / "endpoint.json").rename(elsewhere)
        (directory / "a" / "endpoint.json").symlink_to(elsewhere)
        with pytest.raises(UnsafeError, match="is a link"):
            jobs.find("a")

    def test_a_pipe_is_refused_and_not_waited_for(self, directory):
        made(directory)
        (directory / "a" / "endpoint.json").unlink()
        os.mkfifo(directory / "a" / "endpoint.json", 0o600)
        with pytest.raises(UnsafeError, match="is no file of at most"):
            jobs.find("a")

    def test_they_are_listed_as_not_used_and_never_removed(self, directory):
        made(directory, process=ended())
        (directory / "a" / "endpoint.json").chmod(0o666)
        assert jobs.cleanup() == []
        (found,) = jobs.list_jobs()
        assert "has mode 0666" in found.fault
        assert (directory / "a" / "endpoint.json").exists()


class TestTheDead:
    def test_a_process_that_has_ended_is_dead(self, directory):
        made(directory, process=ended())
        assert [(one.job, one.running) for one in jobs.list_jobs()] == [("a", False)]
        with pytest.raises(ControlError, match="the job 'a' is dead"):
            jobs.find("a")

    def test_a_number_that_another_process_has_got_is_dead(self, directory):
        process = this_process()
        assert alive(process)
        recycled = attrs.evolve(process, started=process.started - 1)
        assert alive(recycled) is False

    def test_what_was_before_the_boot_is_dead(self):
        assert alive(attrs.evolve(this_process(), boot="another")) is False

    def test_what_its_parent_has_not_waited_for_is_dead(self):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
        process = attrs.evolve(this_process(), pid=child.pid, started=started)
        assert alive(process)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert alive(process) is False
        child.wait()

    @pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"namespace": "pid:[1]"}])
    def test_what_is_elsewhere_is_not_known_to_be_dead_and_never_cleaned(self, directory, elsewhere):
        process = attrs.evolve(ended(), **elsewhere)
        assert alive(process) is None
        made(directory, process=process)
        assert jobs.cleanup() == []
        assert [one.running for one in jobs.list_jobs()] == [True]
        with pytest.raises(ControlError, match="is controlled there"):
            jobs.find("a")

    def test_cleanup_removes_the_dead_and_nothing_else(self, directory):
        made(directory, "alive")
        made(directory, "dead", process=ended())
        made(directory, "elsewhere", process=attrs.evolve(ended(), host="another"))
        assert [job.job for job in jobs.cleanup()] == ["dead"]
        assert [job.job for job in jobs.list_jobs()] == ["alive", "elsewhere"]

    def test_cleanup_removes_the_short_directory_of_a_socket(self, directory, tmp_path):
        short = tmp_path / "forgather-x"
        short.mkdir()
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(short / "s"))
        made(directory, process=ended(), socket=str(short / "s"))
        jobs.cleanup()
        assert not short.exists()

    @pytest.mark.parametrize("name", ["forgather-x/precious", "precious"])
    def test_cleanup_removes_no_file_that_is_no_socket(self, directory, tmp_path, name):
        precious = tmp_path / name
        precious.parent.mkdir(exist_ok=True)
        precious.touch()
        made(directory, process=ended(), socket=str(precious))
        assert len(jobs.cleanup()) == 1
        assert precious.exists()

    def test_cleanup_leaves_what_it_does_not_know(self, directory):
        made(directory, process=ended())
        (directory / "a" / "notes.txt").touch()
        (directory / "plain.txt").touch()
        jobs.cleanup()
        assert (directory / "plain.txt").exists()
        assert [path.name for path in directory.glob("*/*") if path.name != "plain.txt"] == ["notes.txt"]

    def test_what_was_being_made_by_a_dead_process_is_removed(self, directory):
        made(directory, process=ended())
        (directory / "a").rename(directory / ".new-0123")
        (directory / ".new-4567").mkdir(mode=0o700)
        (directory / ".old-4567").mkdir(mode=0o700)
        os.utime(directory / ".old-4567", (0, 0))
        jobs.cleanup()
        assert [path.name for path in directory.iterdir()] == [".new-4567"]  # which may be in the making

    def test_a_job_that_took_the_place_of_a_dead_one_is_not_removed(self, directory):
        made(directory, process=ended())
        (dead,) = jobs.list_jobs()
        jobs.cleanup()
        made(directory)
        assert not jobs.remove(dead)
        assert jobs.find("a").process == this_process()


class TestClaims:
    def test_a_dead_jobs_id_is_taken_over(self, directory):
        made(directory, process=ended())
        made(directory)
        assert jobs.find("a").process == this_process()

    def test_a_running_jobs_id_is_not(self, directory):
        made(directory)
        with pytest.raises(ControlError, match="the id 'a' belongs to a job that runs"):
            made(directory)
        with jobs.claimed(directory, "a", exact=False) as claim:
            assert claim.job == "a-2"

    def test_of_two_at_the_same_time_one_gets_it(self, directory):
        def slower():
            with jobs.claimed(directory, "a", exact=True):
                made(directory)

        with pytest.raises(ControlError, match="another job has just taken the id 'a'"):
            slower()
        assert [path.name for path in directory.iterdir()] == ["a"]

    def test_no_home_is_told(self, monkeypatch):
        monkeypatch.setenv("XDG_STATE_HOME", "relative")

        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
        with pytest.raises(ControlError, match="set HOME or XDG_STATE_HOME"):
            jobs.jobs_directory()
