"""Asking a job: the client side."""

import contextlib
import http.client
import ipaddress
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any, Final

import attrs

from forgather_fn.control.answer import reply_of, status_of
from forgather_fn.control.command import Command, ControlError
from forgather_fn.control.endpoint import TOKEN, Endpoint, UnsafeError

SECONDS: Final = 6.0
"""How long a job may take to answer what it answers at once."""
_LIMIT: Final = 1 << 20  # bytes of an answer


class RefusedError(ControlError):
    """The job answered that it does not, or did not, do what it was asked for."""


class UnreachableError(ControlError):
    """The job did not answer."""


class SilentError(UnreachableError):
    """The job is there, and did not answer in time."""


@attrs.frozen
class Target:
    """Where a job is asked.

    Attributes:
        socket: The path of a Unix socket, or None.
        address: An IP address, or None.
        port: Its port.
        token: What to show.
    """

    socket: str | None = None
    address: str | None = None
    port: int | None = None
    token: str | None = attrs.field(default=None, repr=False)


def target(endpoint: Endpoint) -> Target:
    """Say where the job of an endpoint file is asked."""
    return Target(endpoint.socket, endpoint.address, endpoint.port, endpoint.token)


def ask_status(job: Target) -> dict[str, Any]:
    """Ask a job where it is.

    Raises:
        UnreachableError: It did not answer in time.
        RefusedError: It refused.
    """
    return _read(status_of, _ask(job, "GET", "/status", None, SECONDS))


def ask(job: Target, command: Command, *, wait: bool = True, timeout: float | None = None) -> dict[str, Any]:
    """Ask a job for something.

    Args:
        job: Where it is asked.
        command: For what.
        wait: Answer when it has happened, and not at once.
        timeout: Seconds to wait for that; None for as long as it takes.

    Returns:
        What was done: the step, and where a checkpoint is.

    Raises:
        UnreachableError: It did not answer.
        RefusedError: It was not done; why is said.
    """
    body = json.dumps({"command": str(command), "wait": wait})
    return _read(reply_of, _ask(job, "POST", "/control", body, timeout if wait else SECONDS))


def _read(check: Callable[[dict[str, Any]], dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    try:
        return check(found)
    except ValueError as error:
        raise UnreachableError(f"what answers there is no job, or of another version: {error}") from None


def _ask(job: Target, method: str, path: str, body: str | None, timeout: float | None) -> dict[str, Any]:
    host = "localhost" if job.address is None else f"[{job.address}]" if ":" in job.address else job.address
    connection = http.client.HTTPConnection(host, job.port)
    headers = {"Host": host if job.address is None else f"{host}:{job.port}", "Content-Type": "application/json"}
    if job.token is not None:
        headers["Authorization"] = f"Bearer {job.token}"
    try:
        with _connected(job) as connection.sock:
            connection.sock.settimeout(timeout)
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read(_LIMIT)
    except TimeoutError:
        raise SilentError("the job has not answered in time; what it was asked for may still happen") from None
    except (OSError, OverflowError, http.client.HTTPException) as error:
        raise UnreachableError(f"the job does not answer: {type(error).__name__}: {error}") from None
    found = _object(text)
    if status not in (HTTPStatus.OK, HTTPStatus.ACCEPTED):
        raise RefusedError(str(found.get("error", f"status {status}")))
    return found


@contextlib.contextmanager
def _connected(job: Target) -> Iterator[socket.socket]:
    if job.socket is None:
        assert job.address is not None
        with socket.create_connection((job.address, job.port or 0), SECONDS) as connection:
            yield connection
        return
    found = os.lstat(job.socket)
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise UnsafeError(f"{job.socket} is no socket of this user")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SECONDS)
        connection.connect(job.socket)
        yield connection


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UnreachableError("what answers there is no job: its answer is not JSON") from None
    if not isinstance(found, dict):
        raise UnreachableError("what answers there is no job: its answer is no JSON object")
    return found


def target_at(place: str, token: str) -> Target:
    """Say where a job is asked that listens on an address, perhaps of another machine.

    Args:
        place: ``ADDRESS:PORT``, the address an IP address.
        token: What to show.

    Raises:
        ControlError: It is something else.

    Example:
        >>> target_at("127.0.0.1:8900", "secret").port
        8900
    """
    address, _, port = place.rpartition(":")
    try:
        host = str(ipaddress.ip_address(address.strip("[]")))
    except ValueError as error:
        raise ControlError(f"{place!r}: expected ADDRESS:PORT, such as 127.0.0.1:8900; {error}") from None
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ControlError(f"{place!r}: expected ADDRESS:PORT, the port between 1 and 65535")
    if not TOKEN.fullmatch(token):
        raise ControlError("a token has characters of ASCII, without spaces, and at least one: this is none")
    return Target(None, host, int(port), token)
