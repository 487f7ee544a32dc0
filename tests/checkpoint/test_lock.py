import errno
import os
import re
import signal
import socket
import time

import pytest

import forgather_fn as ff
from forgather_fn.checkpoint import RunLockedError, commit, lock, save, saved
from forgather_fn.checkpoint.lock import locked
from tests.checkpoint.faults import Calls, failing, forked, from_then_on
from tests.checkpoint.subjects import BATCHES, drawing, everything, run_to, small
from tests.toys import labelled_batches


@pytest.fixture
def made():
    program = small()
    return program, program.init(0)


def attempt(run):
    """Try to write to a run in another process; give what was said."""

    def other():
        program = small()
        try:
            save(program, program.init(0), run)
        except RunLockedError as error:
            return str(error)
        return "saved"

    return forked(other).value


class TestTwoWriters:
    def test_the_second_fails_at_once_and_says_who_holds_it(self, made, tmp_path):
        with locked(tmp_path):
            said = attempt(tmp_path)
        pattern = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since \d+-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.search(pattern, said)
        assert str(tmp_path) in said
        assert "use another run directory" in said
        assert "this one" not in said

    def test_the_first_is_not_disturbed(self, made, tmp_path):
        program, state = made
        said = []
        steps = program.steps(state, BATCHES[:3])
        observed = ff.every(1, saved(tmp_path), lambda tick: said.append(attempt(tmp_path)))(steps)
        assert ff.last(observed).step == 3
        assert len(said) == 3
        assert all("is being written to by process" in one for one in said)
        assert attempt(tmp_path) == "saved"

    def test_of_one_process_are_two_writers_too(self, made, tmp_path):
        program, state = made
        with (
            locked(tmp_path),
            pytest.raises(RunLockedError, match=f"process {os.getpid()} .* is this one: a stream .*ff\\.saved"),
        ):
            ff.last(ff.every(1, saved(tmp_path))(program.steps(state, BATCHES)))
        assert not state.consumed  # it failed before the first step

    def test_a_reader_needs_no_lock(self, made, tmp_path):
        program, state = made
        save(program, state, tmp_path)
        with locked(tmp_path):
            assert program.restore(tmp_path).step == 0

    def test_where_the_holder_did_not_say_who_it_is(self, tmp_path):
        for text in (b"", b"{", b"[]", b'{"pid": "x"}'):
            with locked(tmp_path):
                (tmp_path / lock.NAME).write_bytes(text)
                with pytest.raises(RunLockedError, match="by another process;"), locked(tmp_path):
                    pytest.fail("locked twice")


class TestAStaleLock:
    def test_of_a_process_that_was_killed_is_no_obstacle(self, tmp_path):
        def holder():
            with locked(tmp_path):
                os.kill(os.getpid(), signal.SIGKILL)

        assert forked(holder).code == -signal.SIGKILL
        assert (tmp_path / lock.NAME).exists()
        assert attempt(tmp_path) == "saved"

    def test_file_of_another_machine_is_no_obstacle(self, tmp_path):
        (tmp_path / lock.NAME).write_text('{"pid": 1, "host": "elsewhere", "since": 0}')
        assert attempt(tmp_path) == "saved"

    def test_is_not_held_by_the_workers_of_a_process_that_was_killed(self, tmp_path):
        """Workers are forked with the lock's file open, and live on for seconds when their parent is killed."""
        reader, writer = os.pipe()

        def holder():
            with locked(tmp_path):
                if os.fork() == 0:
                    os.write(writer, b"%d" % os.getpid())
                    time.sleep(60)
                    os._exit(0)
                time.sleep(60)

        def kill(child):
            os.set_blocking(reader, True)
            worker.append(int(os.read(reader, 20)))
            os.kill(child, signal.SIGKILL)
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            try:
                said.append(attempt(tmp_path))
            finally:
                os.kill(worker[0], signal.SIGKILL)

        worker, said = [], []
        forked(holder, meanwhile=kill)
        os.close(reader)
        os.close(writer)
        assert said == ["saved"]

    def test_a_worker_that_ends_does_not_release_it(self, tmp_path):
        program = everything()
        said = []
        run_to(
            3,
            program,
            program.init(0),
            drawing(workers=2),
            ff.every(3, saved(tmp_path), lambda tick: said.append(attempt(tmp_path))),
        )
        assert "is being written to" in said[0]
        assert attempt(tmp_path) == "saved"


class TestRelease:
    def test_after_the_run(self, made, tmp_path):
        program, state = made
        ff.last(ff.every(2, saved(tmp_path))(program.steps(state, BATCHES)))
        assert attempt(tmp_path) == "saved"

    def test_after_an_exception(self, made, tmp_path):
        def fail(tick):
            raise KeyError("planted")

        program, state = made
        with pytest.raises(KeyError, match="planted"):
            ff.last(ff.every(2, saved(tmp_path), fail)(program.steps(state, BATCHES)))
        assert attempt(tmp_path) == "saved"

    def test_when_the_run_could_not_begin(self, made, tmp_path, monkeypatch):
        def fail(run):
            raise OSError(errno.EIO, "planted")

        program, state = made
        monkeypatch.setattr("forgather_fn.checkpoint.saving.open_session", fail)
        with pytest.raises(OSError, match="planted"):
            ff.last(ff.every(2, saved(tmp_path))(program.steps(state, BATCHES)))
        monkeypatch.undo()
        assert attempt(tmp_path) == "saved"
        assert not lock._held

    def test_when_another_observer_could_not_begin(self, made, tmp_path):
        def fail(steps):
            raise KeyError("planted")

        program, state = made
        broken = ff.Observer(lambda tick: None, open=fail)
        with pytest.raises(KeyError, match="planted"):
            ff.last(ff.every(2, saved(tmp_path), broken)(program.steps(state, BATCHES)))
        assert attempt(tmp_path) == "saved"

    def test_in_a_loop_that_is_left(self, made, tmp_path):
        program, state = made
        for tick in ff.every(1, saved(tmp_path))(program.steps(state, labelled_batches(5))):
            if tick.state.step == 2:
                break
        del tick
        assert attempt(tmp_path) == "saved"

    def test_of_a_save_that_failed(self, made, tmp_path):
        program, state = made
        with Calls(from_then_on(3, failing(errno.EIO))).watched(), pytest.raises(OSError):
            save(program, state, tmp_path)
        assert attempt(tmp_path) == "saved"


def test_the_run_directory_is_made(tmp_path):
    with locked(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a" / lock.NAME).exists()


def test_sessions_of_one_run_share_its_id(made, tmp_path):
    program, state = made
    save(program, state, tmp_path)
    ids = [commit.open_session(tmp_path) for _ in range(2)]
    assert ids[0].run == ids[1].run
    assert ids[0].attempt != ids[1].attempt
