"""What a client, a server and a file of the control say to each other, where one of them says anything."""

import contextlib
import io
import json
import socket
import threading
from collections import deque

import pytest
from hypothesis import strategies as st

from forgather_fn.cli import main
from forgather_fn.control import client, endpoint, jobs
from forgather_fn.control.access import Access, admit, order_of
from forgather_fn.control.cli import _status_lines
from forgather_fn.control.command import ControlError
from forgather_fn.control.dashboard.data import job_details, job_list
from forgather_fn.control.endpoint import Endpoint, UnsafeError
from forgather_fn.control.http import Refused, Request, body_length, parse_head
from forgather_fn.control.watch import view, watch
from tests.robustness.inputs import as_bytes, budget, changed, holds, mutated, values

RECORD = {
    "format": 1,
    "job": "a",
    "run": "/runs/a",
    "since": 1.5,
    "socket": "/nowhere/socket",
    "address": None,
    "port": None,
    "token": None,
    "host": "h",
    "boot": "b",
    "namespace": "n",
    "pid": 1,
    "started": 2,
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The directory of a job."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    place = jobs.make_jobs_directory() / "a"
    place.mkdir(mode=0o700)
    return place


def put(home, data):
    (home / endpoint.NAME).write_bytes(data)
    (home / endpoint.NAME).chmod(0o600)


class TestTheEndpointFile:
    @budget(15)
    def test_of_any_content_is_read_or_refused(self, home, examples):
        def check(data):
            put(home, data)
            with contextlib.suppress(UnsafeError):
                assert isinstance(endpoint.read(home), Endpoint)
            with (
                contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                for action in (["list"], ["list", "--json"], ["status", "a"]):
                    assert main(["control", *action]) in (0, 1, 2)
            json.dumps(job_list(), allow_nan=False)
            home.mkdir(mode=0o700, exist_ok=True)

        holds(check, (changed(RECORD) | values).map(as_bytes) | mutated(as_bytes(RECORD)), examples)


REQUEST = (
    b"POST /control HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 33\r\nAuthorization: Bearer x\r\n\r\n"
)
BODY = b'{"command": "save", "wait": true}'


class TestARequest:
    @budget(60)
    def test_of_any_bytes_is_taken_or_refused(self, examples):
        access = Access(frozenset({"localhost"}), "x" * 16)

        def check(one):
            head, body = one
            with contextlib.suppress(Refused):
                request = parse_head(head)
                assert 0 <= body_length(request) <= 4096
                with contextlib.suppress(Refused):
                    admit(request, access)
                order_of(Request("POST", "/control", request.headers, body))

        bodies = mutated(BODY) | (changed(json.loads(BODY)) | values).map(as_bytes)
        holds(check, st.tuples(mutated(REQUEST) | st.just(REQUEST), bodies), examples)


STATUS = {
    "job": "a",
    "run": "/runs/a",
    "pid": 1,
    "since": 1.0,
    "step": 25,
    "horizon": 100,
    "epoch": 0.5,
    "loss": 2.5,
    "learning_rate": 1e-3,
    "metrics": {"grad_norm": 1.0},
    "steps_per_second": 10.0,
    "samples_per_second": 40.0,
    "remaining": 7.5,
    "estimated_end": 8.0,
    "checkpoint": {"path": "/runs/a/checkpoints/checkpoint-20", "step": 20, "age": 5.0},
    "last_error": None,
    "waiting": ["save"],
    "ended": None,
}


@contextlib.contextmanager
def answering(answer):
    """Answer every connection with these bytes, whatever it asks for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(65536)
                        connection.sendall(answer[0])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield client.Target(None, "127.0.0.1", listener.getsockname()[1], "t" * 16)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)


def spoken(body):
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


class TestAnAnswer:
    @budget(15)
    def test_of_any_bytes_is_shown_or_refused(self, tmp_path, examples):
        answer = [b""]
        token = tmp_path / "token"
        token.write_text("t" * 16)

        def check(data):
            answer[0] = data
            with (
                contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                at = ["--at", f"127.0.0.1:{job.port}", "--token-file", str(token)]
                for action in (["status"], ["status", "--json"], ["save"]):
                    assert main(["control", *action, *at]) in (0, 1, 2)
            with contextlib.suppress(ControlError):
                watch(lambda: client.ask_status(job), io.StringIO(), sleep=stop)

        def stop(seconds):
            raise ControlError

        answers = (changed(STATUS) | values).map(as_bytes).map(spoken) | mutated(spoken(as_bytes(STATUS)))
        with answering(answer) as job:
            holds(check, answers, examples)


class TestWhatWasFound:
    """Each of these once ended in an error of Python's own."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"since": float("nan")}, "since is nan"),
            ({"since": 10**400}, "since is 1000"),
            ({"pid": -1}, "there is no process -1"),
            ({"pid": 10**30, "started": 0}, "there is no process 1000"),
            ({"socket": None, "address": "127.0.0.1", "port": 99999}, "port is 99999"),
            ({"socket": None, "address": "127.0.0.1", "port": 10**400}, "port is 1000"),
            ({"token": "a\r\nX: y"}, "the token has other characters"),
            ({"token": "\u00e9"}, "the token has other characters"),
            ({"socket": "a\0b"}, "is no path from the root"),
            ({"socket": "../../socket"}, "is no path from the root"),
            ({"run": "/a\0b"}, "is no path from the root"),
        ],
        ids=range(11),
    )
    def test_in_an_endpoint_file(self, home, changes, message):
        put(home, as_bytes({**RECORD, **changes}))
        with pytest.raises(UnsafeError, match=message):
            endpoint.read(home)
        assert main(["control", "list"]) == 0
        assert main(["control", "status", "a"]) == 2
        with pytest.raises(ControlError):
            job_details("a")

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (b"[" * 100_000, "not JSON"),
            (b"[]", "no JSON object"),
            (b"{}", "its 'job' is 'None'"),
            (as_bytes({**STATUS, "step": "x"}), "its 'step' is 'x'"),
            (as_bytes({**STATUS, "step": 10**400}), "its 'step' is '1000"),
            (as_bytes({**STATUS, "checkpoint": {}}), "its 'checkpoint' is '{}'"),
            (as_bytes({**STATUS, "metrics": [1]}), "its 'metrics' is"),
            (as_bytes({**STATUS, "waiting": [3]}), "its 'waiting' is"),
        ],
        ids=range(8),
    )
    def test_in_an_answer(self, answer, message):
        with answering([spoken(answer)]) as job, pytest.raises(client.UnreachableError, match=message):
            client.ask_status(job)

    def test_numbers_that_json_has_not(self):
        found = {**STATUS, "loss": "nan", "remaining": "inf", "steps_per_second": "inf", "since": 1e300}
        found["metrics"] = {"checkpoint": 1.0, "since": "nan"}
        with answering([spoken(as_bytes(found))]) as job:
            status = client.ask_status(job)
        assert view(status, deque([1.0]))[2] == "  inf steps/s  40 samples/s  ? left"
        lines = _status_lines(status)
        assert "remaining: ?" in lines
        assert "since: nan" in lines
        assert "checkpoint: 1" in lines

    @pytest.mark.parametrize("place", ["127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1: 80", "x:80"])
    def test_a_place_that_is_none(self, place):
        with pytest.raises(ControlError, match="expected ADDRESS:PORT"):
            client.target_at(place, "t" * 16)

    @pytest.mark.parametrize("token", ["", "a b", "a\r\nX: y", "\u00e9"])
    def test_a_token_that_is_none(self, token):
        with pytest.raises(ControlError, match="a token has characters of ASCII"):
            client.target_at("127.0.0.1:80", token)
