import functools
import multiprocessing
import socket
import tempfile
import time
from pathlib import Path

import pytest

from forgather_fn.control import client, jobs
from tests.control.training import exit_with
from tests.toys import classifier, labelled_batches, trained


@pytest.fixture(autouse=True)
def state_home(monkeypatch):
    """A home for the jobs of the test alone, with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="c", dir="/tmp") as home:
        monkeypatch.setenv("XDG_STATE_HOME", home)
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        yield Path(home)


class Raw:
    """A client that sends what it likes."""

    def __init__(self, endpoint):
        self.endpoint = endpoint
        if endpoint.socket is None:
            self.host = f"{endpoint.address}:{endpoint.port}"
        else:
            self.host = "localhost"

    def connect(self):
        if self.endpoint.socket is None:
            return socket.create_connection((self.endpoint.address, self.endpoint.port), timeout=15)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(15)
        connection.connect(self.endpoint.socket)
        return connection

    def send(self, data):
        """Give the status and the body of the answer, or None where there was none."""
        with self.connect() as connection:
            connection.sendall(data)
            return self.read(connection)

    @staticmethod
    def read(connection):
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        if not answer:
            return None
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()

    def request(self, method="GET", target="/status", body=b"", **headers):
        """Send a request; a header that is None is left out."""
        named = {"host": self.host}
        if self.endpoint.token is not None:
            named["authorization"] = f"Bearer {self.endpoint.token}"
        if method == "POST":
            named |= {"content-type": "application/json", "content-length": str(len(body))}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items() if value)]
        return self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


@functools.cache
def warmed():
    """Make a first step here, so that processes that are forked need not each load what it takes."""
    trained(classifier(), labelled_batches(1))


class Job:
    """A process that trains, and can be controlled; forked, so that it takes milliseconds."""

    def __init__(self, run, logs, options):
        warmed()
        self.run = run
        self.process = multiprocessing.get_context("fork").Process(target=exit_with, args=(str(run), logs, options))
        self.process.start()

    def endpoint(self):
        """Wait until it can be asked, and is past its first steps."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.is_alive():
            mine = [one.endpoint for one in jobs.list_jobs() if one.endpoint and one.endpoint.run == str(self.run)]
            if mine and client.ask_status(client.target(mine[0]))["samples_per_second"]:
                return mine[0]
            time.sleep(0.01)
        raise AssertionError(f"it did not begin; exit code {self.process.exitcode}")

    def end(self):
        """Wait for its end, and give its exit code."""
        self.process.join(60)
        return self.process.exitcode


@pytest.fixture
def job(tmp_path):
    """Start a process that trains in ``tmp_path / name``."""
    started = []

    def start(name="a", *, logs=True, **options):
        started.append(Job(tmp_path / name, logs, options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.join()
