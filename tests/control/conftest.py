import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forgather_fn.control import jobs

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def state_home(tmp_path, monkeypatch):
    """A home for jobs of the test alone, of a path that is short enough for sockets."""
    home = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return home


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


class Job:
    """A process that trains, and can be controlled."""

    def __init__(self, run, *arguments):
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "job.py"), str(run), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/compat"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def endpoint(self):
        """Wait until it can be asked."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            found = [one for one in jobs.list_jobs() if one.endpoint is not None and one.endpoint.run == str(self.run)]
            if found:
                return found[0].endpoint
            time.sleep(0.02)
        raise AssertionError(f"it did not begin: {self.process.communicate(timeout=5)}")

    def end(self):
        """Wait for its end; give its exit code, and what it wrote."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def job(tmp_path):
    """Start a process that trains in ``tmp_path / name``."""
    started = []

    def start(name="a", *arguments):
        started.append(Job(tmp_path / name, *arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()
