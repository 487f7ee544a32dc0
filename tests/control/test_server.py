"""The server: what it takes, and what it refuses."""

import contextlib
import errno
import json
import logging
import os
import socket
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest
import toolz
import torch

import forgather_fn as ff
from forgather_fn.control import Command, ControlError, client, jobs, server, serving
from forgather_fn.control import endpoint as endpoints
from forgather_fn.control.client import ask, ask_status, target
from forgather_fn.control.endpoint import UnsafeError
from forgather_fn.control.progress import Numbers
from tests.control.conftest import Raw
from tests.toys import classifier, labelled_batches, program

TOKEN = "a-token-of-some-length"


@pytest.fixture(autouse=True)
def _no_step_comes(monkeypatch):
    # A status waits half a second for the next step; here nothing trains.
    monkeypatch.setattr(serving, "_FRESH", 0.01)


@pytest.fixture(params=["socket", "tcp"])
def served(request, tmp_path):
    """An inbox that is served, and a client that sends what it likes."""
    options = {} if request.param == "socket" else {"port": 0, "token": TOKEN}
    with ff.serve(tmp_path / "a", **options) as inbox:
        yield inbox, Raw(jobs.find("a"))


ORDER = b'{"command": "save", "wait": false}'


class TestWhatIsTaken:
    def test_status(self, served):
        status, body = served[1].request()
        assert status == 200
        assert json.loads(body)["job"] == "a"

    def test_statuses_that_no_step_answers_leave_nothing_behind(self, served):
        inbox, raw = served
        for _ in range(20):
            assert raw.request()[0] == 200
        assert len(inbox._looks) <= server.CONNECTIONS
        wanted = inbox.look()
        assert len(inbox._looks) == 1
        inbox.show(numbers := Numbers(3, inbox.clock(), {}))
        assert wanted.result(timeout=0) is numbers
        assert not inbox.looked_for()

    def test_a_look_that_was_given_up_is_shown_to_nobody(self, served):
        inbox, _ = served
        first, second = inbox.look(), inbox.look()
        assert first.cancel()
        inbox.show(numbers := Numbers(3, inbox.clock(), {}))
        assert second.result(timeout=0) is numbers

    def test_a_command(self, served):
        inbox, raw = served
        assert raw.request("POST", "/control", ORDER) == (202, '{"command": "save", "accepted": true}\n')
        assert inbox.waiting() == (Command.SAVE,)

    def test_the_answer_to_a_command_comes_when_it_has_happened(self, served):
        inbox, raw = served
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(raw.request("POST", "/control", b'{"command": "save"}'))
        )
        thread.start()
        while (request := inbox.take()) is None:
            time.sleep(0.005)
        assert answers == []
        request.done(step=7, paths=["/x"])
        thread.join()
        assert answers == [(200, '{"command": "save", "step": 7, "paths": ["/x"]}\n')]

    def test_a_command_that_nothing_ever_looks_at_is_told(self, served, monkeypatch):
        inbox, raw = served
        assert json.loads(raw.request()[1])["last_error"] is None
        monkeypatch.setattr(serving, "_UNATTENDED", 0.05)
        status, body = raw.request("POST", "/control", b'{"command": "save"}')
        assert status == 409
        assert "save: nothing in this run has looked yet at what it is asked for: " in body
        assert "ff.controlled(inbox) among its stages. It stays asked for" in body
        assert inbox.waiting() == (Command.SAVE,)
        assert "ff.controlled(inbox)" in json.loads(raw.request()[1])["last_error"]
        made = program(classifier())  # a stream that begins later finds it
        final = made.steps(made.init(0), labelled_batches(2))
        ff.last(ff.controlled(inbox)(final))
        assert inbox.waiting() == ()
        assert json.loads(raw.request()[1])["last_error"] is None

    def test_one_that_a_long_step_keeps_waiting_is_not(self, served, monkeypatch):
        inbox, raw = served
        monkeypatch.setattr(serving, "_UNATTENDED", 0.01)
        inbox.take()
        answers = []
        order = b'{"command": "save"}'
        thread = threading.Thread(target=lambda: answers.append(raw.request("POST", "/control", order)))
        thread.start()
        time.sleep(0.1)
        while (request := inbox.take()) is None:
            time.sleep(0.005)
        request.done(step=7)
        thread.join()
        assert answers == [(200, '{"command": "save", "step": 7}\n')]

    def test_numbers_that_json_has_not_are_texts(self, served):
        inbox, raw = served
        inbox.numbers = Numbers(1, float("inf"), {"loss": float("nan"), "x": float("-inf")})
        status = json.loads(raw.request()[1])
        assert (status["loss"], status["metrics"]) == ("nan", {"x": "-inf"})
        answers = []
        body = b'{"command": "evaluate"}'
        thread = threading.Thread(target=lambda: answers.append(raw.request("POST", "/control", body)))
        thread.start()
        while (request := inbox.take()) is None:
            time.sleep(0.005)
        request.done(step=7, results={"eval_loss": float("nan"), "eval_x": torch.tensor(2)})
        thread.join()
        assert answers[0][0] == 200
        assert json.loads(answers[0][1])["results"] == {"eval_loss": "nan", "eval_x": "tensor(2)"}

    def test_what_cannot_be_done_is_a_conflict(self, served):
        inbox, raw = served
        inbox.end("the run has ended")
        answer = raw.request("POST", "/control", b'{"command": "save"}')
        assert answer == (409, '{"error": "save: the run has ended"}\n')


# Each is what is changed of a request that would be taken, and the status that it gets.
REFUSED = {
    "another host": (421, {"host": "evil.example"}),
    "a host that only begins alike": (421, {"host": "localhost.evil.example"}),
    "another port": (421, {"host": "localhost:1"}),
    "no host": (421, {"host": None}),
    "an origin": (403, {"origin": "http://localhost"}),
    "an origin of its own": (403, {"origin": "null"}),
    "a browser's fetch": (403, {"sec_fetch_site": "same-origin"}),
    "a browser's navigation": (403, {"sec_fetch_mode": "navigate"}),
    "a referer": (403, {"referer": "http://localhost/"}),
    "a cookie": (403, {"cookie": "token=x"}),
    "traversal": (404, {"target": "/../../etc/passwd"}),
    "traversal, encoded": (404, {"target": "/%2e%2e/%2e%2e/etc/passwd"}),
    "traversal behind a known path": (404, {"target": "/control/../../status"}),
    "a query": (404, {"target": "/control?x=1"}),
    "another path": (404, {"target": "/jobs"}),
    "an absolute target": (400, {"target": "http://localhost/control"}),
    "the other path": (405, {"target": "/status"}),
    **{f"the method {name}": (405, {"method": name}) for name in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")},
    "a method in small letters": (400, {"method": "post"}),
    "a form": (415, {"content_type": "application/x-www-form-urlencoded"}),
    "plain text": (415, {"content_type": "text/plain"}),
    "text that names json": (415, {"content_type": "text/plain; application/json"}),
    "no type": (415, {"content_type": None}),
    "no length": (411, {"content_length": None}),
    "a length that is no number": (400, {"content_length": "-1"}),
    "a length with a sign": (400, {"content_length": "+5"}),
    "a huge length": (413, {"content_length": "99999999999"}),
    "a body that is too large": (413, {"body": b" " * 4097}),
    "chunks": (501, {"transfer_encoding": "chunked"}),
    "a header that comes twice": (400, {"x": "1\r\nX: 2"}),
    "a host that comes twice": (400, {"x": "1\r\nHost: localhost"}),
    "a header without a colon": (400, {"x": "1\r\nhost"}),
    "a folded header": (400, {"x": "a\r\n b"}),
    "a header with a null": (400, {"x": "a\0b"}),
    "too many headers": (431, {"x": "y" * 9000}),
    "a body that is no json": (400, {"body": b"{"}),
    "a body that is no object": (400, {"body": b'["save"]'}),
    "a body of nests": (400, {"body": b"[" * 4000}),
    "an unknown command": (400, {"body": b'{"command": "exec"}'}),
    "a command that is no text": (400, {"body": b'{"command": ["save"]}'}),
    "no command": (400, {"body": b"{}"}),
    "an argument": (400, {"body": b'{"command": "save", "path": "/etc"}'}),
    "a wait that is no truth": (400, {"body": b'{"command": "save", "wait": "no"}'}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(served, name):
    inbox, raw = served
    status, changes = REFUSED[name]
    answer = raw.request(**{"method": "POST", "target": "/control", "body": ORDER, **changes})
    assert answer is not None
    assert answer[0] == status
    assert "error" in json.loads(answer[1])
    assert inbox.waiting() == ()


@pytest.mark.parametrize(
    "token", [None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, f"bearer {TOKEN}"]
)
def test_a_wrong_token_is_refused(tmp_path, token):
    with ff.serve(tmp_path / "a", port=0, token=TOKEN) as inbox:
        raw = Raw(jobs.find("a"))
        assert raw.request("POST", "/control", ORDER, authorization=token)[0] == 401
        assert raw.request(authorization=token)[0] == 401
        assert inbox.waiting() == ()


def test_the_token_is_not_asked_before_the_host(tmp_path):
    # So that a page that was led here by name cannot even tell whether a token is right.
    with ff.serve(tmp_path / "a", port=0, token=TOKEN):
        raw = Raw(jobs.find("a"))
        assert raw.request(host="evil.example", authorization=None)[0] == 421


def test_tokens_are_compared_in_constant_time(monkeypatch, tmp_path):
    compared = []
    real = serving.admit.__globals__["hmac"].compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    with ff.serve(tmp_path / "a", port=0, token=TOKEN):
        Raw(jobs.find("a")).request(authorization="Bearer x")
    assert compared == [(b"Bearer x", f"Bearer {TOKEN}".encode())]


def test_without_a_token_one_is_made_that_nobody_guesses(tmp_path):
    with ff.serve(tmp_path / "a", port=0), ff.serve(tmp_path / "b", port=0):
        found = [jobs.find(job) for job in "ab"]
    tokens = {one.token for one in found}
    assert len(tokens) == 2
    assert min(map(len, tokens)) >= 40
    assert not any(token in repr(found) for token in tokens)


@pytest.mark.parametrize(
    "data", [b"", b"\r\n\r\n", b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET /status"]
)
def test_what_is_no_http_does_not_disturb(served, data):
    raw = served[1]
    with raw.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = raw.read(connection)
        assert answer is None or answer[0] == 400
    assert raw.request()[0] == 200


def is_open(connection):
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


class TestSlowClients:
    def test_one_that_sends_little_by_little_is_ended(self, served, monkeypatch):
        monkeypatch.setattr(server, "SECONDS", 0.3)
        raw = served[1]
        begun = time.monotonic()
        with raw.connect() as connection, contextlib.suppress(OSError):
            for byte in b"GET /status HTTP/1.1\r\nHost: " + b"x" * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        assert 0.2 < time.monotonic() - begun < 2.0

    def test_one_that_sends_nothing_is_answered_and_ended(self, served, monkeypatch):
        monkeypatch.setattr(server, "SECONDS", 0.2)
        raw = served[1]
        with raw.connect() as connection:
            assert raw.read(connection)[0] == 408

    @pytest.mark.parametrize(
        "stuck", [b"", b"GET /status HTTP/1.1\r\n", b"POST /control HTTP/1.1\r\nHost: localhost\r\n"]
    )
    def test_twenty_stuck_ones_delay_nobody(self, served, stuck):
        inbox, raw = served
        before = threading.active_count()
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(raw.connect()) for _ in range(20)]
            for connection in connections:
                with contextlib.suppress(OSError):  # the first ones have been ended already
                    connection.sendall(stuck)
            begun = time.monotonic()
            assert raw.request()[0] == 200
            assert raw.request("POST", "/control", ORDER)[0] == 202
            assert time.monotonic() - begun < 1.0
            assert threading.active_count() == before
            assert 0 < sum(map(is_open, connections)) <= server.CONNECTIONS
        assert inbox.waiting() == (Command.SAVE,)

    def test_at_most_eight_wait_for_answers(self, served):
        inbox, raw = served
        body = b'{"command": "save"}'
        with contextlib.ExitStack() as stack:
            for number in range(8):
                connection = stack.enter_context(raw.connect())
                token = f"Authorization: Bearer {TOKEN}\r\n" if raw.endpoint.token else ""
                head = f"POST /control HTTP/1.1\r\nHost: {raw.host}\r\nContent-Type: application/json\r\n{token}"
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                while len(inbox.waiting()) <= number:
                    time.sleep(0.002)
            assert raw.request()[0] == 503
        deadline = time.monotonic() + 5
        while raw.request()[0] != 200:  # those that waited have hung up
            assert time.monotonic() < deadline
        assert len(inbox.waiting()) == 8  # and have still asked

    def test_a_client_that_hangs_delays_no_end(self, tmp_path):
        with contextlib.ExitStack() as stack:
            with ff.serve(tmp_path / "a"):
                raw = Raw(jobs.find("a"))
                stack.enter_context(raw.connect()).sendall(b"GET ")
                begun = time.monotonic()
            assert time.monotonic() - begun < 1.0


class TestWhoMayConnect:
    def test_the_socket_is_the_users_alone(self, tmp_path):
        previous = os.umask(0)
        try:
            with ff.serve(tmp_path / "a"):
                path = Path(jobs.find("a").socket)
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        finally:
            os.umask(previous)

    def test_another_user_is_refused_even_if_the_file_let_them(self, tmp_path, monkeypatch):
        with ff.serve(tmp_path / "a"):
            raw = Raw(jobs.find("a"))
            monkeypatch.setattr(server, "_allowed", lambda user: False)
            assert raw.request() == (403, '{"error": "this is another user\'s job"}\n')

    def test_tcp_listens_on_this_machine_alone(self, tmp_path):
        with ff.serve(tmp_path / "a", port=0):
            endpoint = jobs.find("a")
            assert endpoint.address == "127.0.0.1"
            others = [one for one in _addresses() if not one.startswith("127.")]
            for address in others:
                with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
                    socket.create_connection((address, endpoint.port), timeout=2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"host": "10.1.2.3"}, "is reached by other machines"),
            ({"host": "10.1.2.3", "remote": True}, "is reached by other machines"),
            ({"host": "10.1.2.3", "token": TOKEN}, "is reached by other machines"),
            ({"host": "0.0.0.0", "remote": True, "token": TOKEN}, "stands for all addresses"),
            ({"host": "::", "remote": True, "token": TOKEN}, "stands for all addresses"),
            ({"host": "example.com"}, "expected an IP address of this machine"),
            ({"port": 70000}, "port=70000 is not between"),
            ({"port": 0, "token": "short"}, "a token has at least 16 characters"),
            ({"port": 0, "token": "x" * 20 + "\r\nX: y"}, "a token has at least 16 characters"),
            ({"token": TOKEN}, "token and remote are for TCP"),
            ({"job_id": "../a"}, "is no id of a job"),
            ({"job_id": "a\n"}, "is no id of a job"),
        ],
    )
    def test_what_is_not_safe_is_refused_before_anything_is_opened(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message), ff.serve(tmp_path / "a", **options):
            pass

    def test_an_address_of_other_machines_needs_a_flag_and_a_token_and_warns(self, tmp_path, caplog, monkeypatch):
        bound = []
        real = socket.socket.bind
        monkeypatch.setattr(
            socket.socket, "bind", lambda self, where: bound.append(where) or real(self, ("127.0.0.1", 0))
        )
        with ff.serve(tmp_path / "a", host="10.1.2.3", port=0, remote=True, token=TOKEN):
            assert bound == [("10.1.2.3", 0)]
            assert "can be controlled from other machines" in caplog.text
            # A client that finds the address in a file does not send the token there.
            with pytest.raises(UnsafeError, match=r"10\.1\.2\.3 is not of this machine"):
                jobs.find("a")

    def test_a_socket_of_another_kind_or_owner_is_not_used(self, tmp_path):
        plain = tmp_path / "plain"
        plain.touch()
        with pytest.raises(UnsafeError, match="is no socket of this user"):
            ask_status(client.Target(str(plain)))


def _addresses():
    with contextlib.suppress(OSError):
        return [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return []


class TestFaults:
    """A run that cannot be served goes on, with one warning, and leaves nothing behind."""

    def trained(self, run, **options):
        made = program(classifier())
        with ff.serve(run, **options) as inbox:
            return toolz.pipe(made.steps(made.init(0), labelled_batches(3)), ff.controlled(inbox), ff.last).step

    @pytest.fixture(autouse=True)
    def warned(self, caplog, state_home):
        yield
        warnings = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert warnings[0].startswith("the run cannot be controlled from outside, and goes on without: ")
        assert [path for path in state_home.rglob("*") if path.is_file() or path.is_socket()] == []
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("control of")]

    def test_a_full_disk(self, tmp_path, monkeypatch):
        def full(file):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        assert self.trained(tmp_path / "a") == 3

    def test_a_disk_that_cannot_be_written_to(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
        assert self.trained(tmp_path / "a") == 3

    def test_a_directory_that_others_can_write_to(self, tmp_path):
        jobs.make_jobs_directory().chmod(0o777)
        assert self.trained(tmp_path / "a") == 3

    def test_a_port_that_is_taken(self, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            assert self.trained(tmp_path / "a", port=taken.getsockname()[1]) == 3

    def test_an_address_that_is_not_this_machines(self, tmp_path):
        assert self.trained(tmp_path / "a", host="192.0.2.1", remote=True, token=TOKEN) == 3

    def test_no_thread_can_be_started(self, tmp_path, monkeypatch):
        def full(self):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", full)
        assert self.trained(tmp_path / "a") == 3

    def test_a_server_that_fails_at_its_start(self, tmp_path, monkeypatch):
        async def failing(*args, **kwargs):
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr("asyncio.start_server", failing)
        assert self.trained(tmp_path / "a") == 3

    def test_an_id_that_is_taken(self, tmp_path, caplog):
        with ff.serve(tmp_path / "a", job_id="mine"):
            assert self.trained(tmp_path / "b", job_id="mine") == 3

    def test_no_directory_is_short_enough(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("x" * 100)))
        monkeypatch.setattr(os.path, "isdir", lambda path: False)
        assert self.trained(tmp_path / "a") == 3


class TestPlaces:
    def test_a_path_that_is_too_long_falls_back_to_a_short_directory(self, tmp_path, monkeypatch):
        with tempfile.TemporaryDirectory(prefix="c", dir="/tmp") as short:
            monkeypatch.setattr(tempfile, "tempdir", short)
            monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("x" * 100)))
            with ff.serve(tmp_path / "a"):
                endpoint = jobs.find("a")
                assert len(endpoint.socket) <= 107
                assert endpoint.socket.startswith(f"{short}/forgather-")
                assert stat.S_IMODE(os.stat(os.path.dirname(endpoint.socket)).st_mode) == 0o700
                assert ask_status(target(endpoint))["job"] == "a"
            assert os.listdir(short) == []

    def test_so_does_a_disk_that_cannot_hold_sockets(self, tmp_path, monkeypatch, state_home):
        real = socket.socket.bind

        def bind(self, where):
            if str(state_home) in where:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            real(self, where)

        monkeypatch.setattr(socket.socket, "bind", bind)
        with ff.serve(tmp_path / "a"):
            endpoint = jobs.find("a")
            assert "/forgather-" in endpoint.socket
            assert ask_status(target(endpoint))["job"] == "a"
        assert not os.path.exists(os.path.dirname(endpoint.socket))

    @pytest.mark.parametrize("length", [106, 107, 108])
    def test_the_longest_path_is_of_107_bytes(self, tmp_path, monkeypatch, length):
        with tempfile.TemporaryDirectory(prefix="c", dir="/tmp") as home:
            rest = len(f"{home}//forgather/jobs/.new-01234567/socket")
            monkeypatch.setenv("XDG_STATE_HOME", f"{home}/{'x' * (length - rest)}")
            with ff.serve(tmp_path / "a"):
                endpoint = jobs.find("a")
                assert ("/jobs/a/socket" in endpoint.socket) == (length <= 107)
                assert ask_status(target(endpoint))["job"] == "a"

    def test_ids_are_made_of_the_runs_name(self, tmp_path):
        for name, job in {"runs/my run!": "my-run-", "...": "job", "ü": "job", "x" * 80: "x" * 64}.items():
            with ff.serve(tmp_path / name) as inbox:
                assert inbox.job == job

    def test_runs_of_one_name_that_begin_at_once_are_all_served(self, tmp_path, monkeypatch):
        names = []
        monkeypatch.setattr(jobs, "_free_id", lambda *args, real=jobs._free_id: names.append(real(*args)) or names[-1])
        with contextlib.ExitStack() as stack:
            real = endpoints.write

            def overtaken(directory, endpoint):
                real(directory, endpoint)
                if len(names) == 1:  # another begins while this one does
                    stack.enter_context(ff.serve(tmp_path / "y" / "a"))

            monkeypatch.setattr(endpoints, "write", overtaken)
            inbox = stack.enter_context(ff.serve(tmp_path / "x" / "a"))
            assert (inbox.job, names) == ("a-2", ["a", "a", "a-2"])
            assert ask_status(target(jobs.find("a-2")))["run"] == str(tmp_path / "x" / "a")
            assert ask_status(target(jobs.find("a")))["run"] == str(tmp_path / "y" / "a")

    def test_a_run_without_a_directory_can_be_served(self):
        with ff.serve() as inbox:
            assert inbox.job == "job"
            assert ask_status(target(jobs.find("job")))["run"] is None

    def test_only_the_first_process_serves(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        with ff.serve(tmp_path / "a") as inbox:
            assert (inbox.job, jobs.list_jobs()) == (None, [])

    def test_ipv6(self, tmp_path):
        if not socket.has_ipv6:
            pytest.skip("this machine has no IPv6")
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
        with ff.serve(tmp_path / "a", host="::1"):
            assert ask_status(target(jobs.find("a")))["job"] == "a"

    def test_a_run_whose_block_fails_leaves_nothing(self, tmp_path, state_home):
        with pytest.raises(KeyError), ff.serve(tmp_path / "a"):
            raise KeyError("x")
        assert jobs.list_jobs() == []

    def test_whoever_waits_is_answered_when_the_run_ends(self, tmp_path):
        answers = []

        def wait(found):
            try:
                ask(found, Command.SAVE)
            except ControlError as error:
                answers.append(str(error))

        with ff.serve(tmp_path / "a") as inbox:
            thread = threading.Thread(target=wait, args=(target(jobs.find("a")),))
            thread.start()
            while not inbox.waiting():
                time.sleep(0.002)
        thread.join()
        assert answers == ["save: the run has ended"]
