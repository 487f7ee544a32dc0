"""The commands, on processes that train: from the terminal, and as a client."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

import forgather_fn as ff
from forgather_fn.checkpoint import latest, list_checkpoints
from forgather_fn.cli import main
from forgather_fn.control import Aborted, Command, client, jobs
from forgather_fn.control.client import RefusedError, UnreachableError, ask, ask_status, target
from forgather_fn.testing.processes import processes
from tests.control.conftest import Raw
from tests.control.training import train

TCP = {"port": 0}


def saved_steps(run):
    return [entry.step for entry in list_checkpoints(run) if entry.whole]


def left(state_home):
    """What there is in the directory of jobs."""
    return [path for path in state_home.rglob("*") if path.name not in ("forgather", "jobs")]


@pytest.mark.parametrize(("logs", "options"), [(True, {}), (False, TCP)], ids=["logs-socket", "silent-tcp"])
class TestCommands:
    def test_those_after_which_it_goes_on(self, job, logs, options):
        started = job(logs=logs, **options)
        found = target(started.endpoint())
        status = ask_status(found)
        assert (status["job"], status["horizon"], status["world_size"]) == ("a", 10**6, 1)
        assert status["loss"] > 0
        assert status["learning_rate"] == 0.01
        assert status["samples_per_second"] > 0
        assert status["estimated_end"] > time.time()
        assert status["checkpoint"] is None
        saved = ask(found, Command.SAVE)
        assert saved["step"] >= status["step"]
        assert saved["paths"] == [str(started.run / "checkpoints" / f"checkpoint-{saved['step']}")]
        assert saved_steps(started.run) == [saved["step"]]
        assert ask(found, Command.EVALUATE)["results"]["eval_loss"] > 0
        assert ask(found, Command.SAVE, wait=False) == {"command": "save", "accepted": True}
        later = ask_status(found)
        assert later["checkpoint"]["step"] >= saved["step"]
        assert 0 <= later["checkpoint"]["age"] < 60
        assert later["step"] > status["step"]
        assert started.process.is_alive()

    @pytest.mark.parametrize("command", ["stop", "save-stop"])
    def test_those_that_save_and_end(self, job, state_home, logs, options, command):
        started = job(logs=logs, **options)
        answer = ask(target(started.endpoint()), Command(command))
        assert started.end() == 0
        assert saved_steps(started.run) == [answer["step"]]
        assert answer["checkpoint"] == str(latest(started.run).path)
        assert left(state_home) == []

    def test_abort(self, job, state_home, logs, options):
        started = job(logs=logs, **options)
        found = target(started.endpoint())
        saved = ask(found, Command.SAVE)["step"]
        time.sleep(0.02)
        answer = ask(found, Command.ABORT)
        assert started.end() == 3
        assert answer["step"] > saved
        assert answer["checkpoint"] == str(latest(started.run).path)
        assert saved_steps(started.run) == [saved]
        assert left(state_home) == []


class TestTheTerminal:
    def test_a_name_that_a_terminal_would_act_on_is_shown_as_an_escape(self, capsys, tmp_path):
        with ff.serve(tmp_path / "\x1b[2Jx"):
            assert main(["control", "list"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("2Jx ")
        assert "\\x1b[2Jx" in out
        assert "\x1b" not in out

    def test_from_list_to_stop(self, job, capsys, state_home):
        started = job()
        endpoint = started.endpoint()
        assert main(["control", "list"]) == 0
        assert capsys.readouterr().out.split()[:4] == ["a", "running", "process", str(endpoint.process.pid)]
        assert main(["control", "status", "a"]) == 0
        told = capsys.readouterr().out
        assert f"run: {started.run}\n" in told
        assert "\nloss: " in told
        assert main(["control", "status", "a", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["pid"] == endpoint.process.pid
        assert main(["control", "evaluate", "a"]) == 0
        assert "evaluate: done at step" in capsys.readouterr().out
        assert main(["control", "save", "a", "--no-wait"]) == 0
        assert capsys.readouterr().out == "save: asked for\n"
        assert main(["control", "cleanup"]) == 0
        assert main(["control", "stop", "a"]) == 0
        assert f"newest checkpoint: {started.run}/checkpoints/checkpoint-" in capsys.readouterr().out
        assert started.end() == 0
        assert main(["control", "stop", "a"]) == 2
        assert "there is no job 'a'; running: none" in capsys.readouterr().err

    def test_what_is_refused_by_the_job_exits_with_one(self, job, capsys, monkeypatch):
        started = job()
        started.endpoint()

        def refused(*args, **kwargs):
            raise RefusedError("evaluate: this run evaluates nothing")

        monkeypatch.setattr("forgather_fn.control.cli.ask", refused)
        assert main(["control", "evaluate", "a"]) == 1
        assert capsys.readouterr().err == "evaluate: this run evaluates nothing\n"

    def test_a_job_elsewhere_is_asked_with_a_token_of_a_file(self, job, tmp_path, capsys):
        endpoint = job(**TCP).endpoint()
        place = f"127.0.0.1:{endpoint.port}"
        token = tmp_path / "token"
        token.write_text(endpoint.token + "\n")
        assert main(["control", "status", "--at", place, "--token-file", str(token)]) == 0
        token.write_text("another-token-of-some-length")
        assert main(["control", "status", "--at", place, "--token-file", str(token)]) == 1
        assert "the token is missing or wrong" in capsys.readouterr().err
        assert main(["control", "status", "--at", place]) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["status"], "which job? forgather control status JOB"),
            (["status", "../../etc"], "'../../etc' is no id of a job"),
            (["status", "--at", "nowhere:1", "--token-file", "/dev/null"], "expected ADDRESS:PORT"),
        ],
    )
    def test_what_cannot_be_asked_is_told(self, capsys, arguments, message):
        assert main(["control", *arguments]) == 2
        assert message in capsys.readouterr().err


class TestTheEnd:
    def test_a_killed_job_is_listed_as_dead_and_cleaned(self, job, capsys, state_home):
        started = job()
        started.endpoint()
        os.kill(started.process.pid, signal.SIGKILL)
        started.end()
        assert len(left(state_home)) == 3
        assert main(["control", "status", "a"]) == 2
        assert "the job 'a' is dead" in capsys.readouterr().err
        assert main(["control", "list"]) == 0
        assert capsys.readouterr().out.split()[:2] == ["a", "dead"]
        assert left(state_home) == []
        assert main(["control", "list"]) == 0
        assert capsys.readouterr().err.startswith("no jobs: ")

    def test_cleanup_removes_the_dead_one(self, job, capsys, state_home):
        dead, alive = job("dead"), job("alive")
        dead.endpoint()
        alive.endpoint()
        os.kill(dead.process.pid, signal.SIGKILL)
        dead.end()
        assert main(["control", "cleanup"]) == 0
        assert capsys.readouterr().out == "dead removed\n"
        assert [one.job for one in jobs.list_jobs()] == ["alive"]
        assert ask_status(target(alive.endpoint()))["step"]

    def test_sigterm_leaves_nothing(self, job, state_home):
        started = job()
        started.endpoint()
        os.kill(started.process.pid, signal.SIGTERM)
        assert started.end() == 75
        assert left(state_home) == []

    def test_a_job_that_stands_still_is_told_of_in_time(self, job, monkeypatch):
        started = job()
        found = target(started.endpoint())
        monkeypatch.setattr(client, "SECONDS", 0.3)
        os.kill(started.process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(UnreachableError, match="has not answered in time"):
                ask(found, Command.SAVE, timeout=0.3)
            with pytest.raises(UnreachableError, match="has not answered in time"):
                ask_status(found)
        finally:
            os.kill(started.process.pid, signal.SIGCONT)

    def test_twenty_stuck_clients_delay_neither_a_step_nor_a_client(self, job):
        started = job()
        endpoint = started.endpoint()
        found, raw = target(endpoint), Raw(endpoint)

        def steps_in_a_while():
            before = ask(found, Command.SAVE)["step"]
            time.sleep(0.3)
            return ask(found, Command.SAVE)["step"] - before

        alone = steps_in_a_while()
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                with contextlib.suppress(OSError):
                    stack.enter_context(raw.connect()).sendall(b"POST /control HTTP/1.1\r\n")
            begun = time.monotonic()
            crowded = steps_in_a_while()
            assert time.monotonic() - begun < 5.0
        assert crowded > alone / 5  # a step that waited for one of them would take seconds

    def test_two_runs_of_one_name_have_ids_of_their_own(self, job, tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "y").mkdir()
        first, second = job("x/same"), job("y/same")
        assert {first.endpoint().job, second.endpoint().job} == {"same", "same-2"}


def serving_with_a_worker(run, pipe):
    with ff.serve(run):
        if os.fork() == 0:
            pipe.send(os.getpid())
            time.sleep(30)
            os._exit(0)
        time.sleep(30)


def test_a_worker_that_outlives_a_killed_job_does_not_keep_its_socket(tmp_path):
    # As a worker of a data loader may: it is forked, and has copies of all that is open.
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=serving_with_a_worker, args=(str(tmp_path / "a"), there))
    process.start()
    worker = here.recv()
    try:
        endpoint = jobs.find("a")
        process.kill()
        process.join()
        with pytest.raises(UnreachableError, match="ConnectionRefused"):
            ask_status(target(endpoint))
    finally:
        os.kill(worker, signal.SIGKILL)


def trained_by_two(home, run, logs):
    os.environ["XDG_STATE_HOME"] = home
    try:
        return train(run, logs)
    except Aborted as aborted:
        return -aborted.step


@pytest.fixture(scope="module")
def pair():
    with processes(2) as pool:
        yield pool


@pytest.mark.parametrize("logs", [True, False], ids=["logs", "silent"])
@pytest.mark.parametrize("command", ["stop", "save-stop", "abort"])
def test_two_processes_act_at_the_same_step(pair, tmp_path, state_home, command, logs):
    ends, arguments = [], (str(state_home), str(tmp_path / "a"), logs)
    thread = threading.Thread(target=lambda: ends.extend(pair.run(trained_by_two, *arguments)))
    thread.start()
    while not jobs.list_jobs():
        assert thread.is_alive()
        time.sleep(0.01)
    found = target(jobs.find("a"))
    saved = ask(found, Command.SAVE)
    assert ask(found, Command.EVALUATE)["results"]["eval_loss"] > 0
    assert [one.job for one in jobs.list_jobs()] == ["a"]
    assert ask_status(found)["world_size"] == 2
    answer = ask(found, Command(command))
    thread.join(60)
    step = answer["step"]
    assert ends == [step * (-1 if command == "abort" else 1)] * 2
    expected = [saved["step"]] if command == "abort" else [saved["step"], step]
    assert saved_steps(tmp_path / "a") == expected
    assert left(state_home) == []


def test_watching_reads_until_the_job_ends(job, capsys):
    started = job()
    found = target(started.endpoint())
    thread = threading.Thread(target=lambda: (time.sleep(0.3), ask(found, Command.STOP)))
    thread.start()
    assert main(["control", "watch", "a", "--interval", "0.1"]) == 0
    thread.join()
    *looks, last = capsys.readouterr().out.splitlines()
    assert looks
    assert all(line.startswith("a  step ") for line in looks)
    assert last == "the job has ended"
    assert started.end() == 0
