"""The file that says how a job is reached: written for its user alone, and read with suspicion."""

import errno
import ipaddress
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, Final

import attrs

from forgather_fn.control.command import ControlError, checked_id
from forgather_fn.control.process import Process

NAME: Final = "endpoint.json"
TOKEN: Final = re.compile(r"[\x21-\x7e]+")
"""What a token is made of: it goes into a header of a request."""
_LIMIT: Final = 1 << 16  # bytes of the file


class UnsafeError(ControlError):
    """A file says how a job is reached, and someone else could have written it, or it leads elsewhere."""


@attrs.frozen(kw_only=True)
class Endpoint:
    """How a job is reached, and which process it is.

    Attributes:
        job: Its id.
        run: Its run directory, where it has one.
        since: When it began to be served, in seconds since 1970.
        process: The process.
        socket: The path of its Unix socket; None where it is reached by TCP.
        address: The IP address, otherwise.
        port: The port, otherwise.
        token: What a client must show; None where the socket's permissions say who may connect.
    """

    job: str
    run: str | None
    since: float
    process: Process
    socket: str | None = None
    address: str | None = None
    port: int | None = None
    token: str | None = attrs.field(default=None, repr=False)


def write(directory: Path, endpoint: Endpoint) -> None:
    """Write how a job is reached, for its user's eyes alone, and wait until it is on the disk."""
    process = attrs.asdict(endpoint.process)
    record = {"format": 1, **attrs.asdict(endpoint, filter=lambda field, value: field.name != "process"), **process}
    file = os.open(directory / NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "wb") as stream:
        stream.write(json.dumps(record, indent=1).encode() + b"\n")
        stream.flush()
        os.fsync(file)


def read(directory: Path) -> Endpoint:
    """Read the file of a job.

    Raises:
        UnsafeError: Others could have read or written it, it leads to another machine, or it is something else.
        OSError: It cannot be read.
    """
    path = directory / NAME
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeError(f"{path} is a link") from None
        raise
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LIMIT:
            raise UnsafeError(f"{path} is no file of at most {_LIMIT:,} bytes")
        _check_owner(path, found, 0o077)
        text = os.read(file, _LIMIT)
    finally:
        os.close(file)
    try:
        return _endpoint(json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnsafeError(f"{path} does not say how a job is reached: {error}") from None


def _endpoint(record: Any) -> Endpoint:
    def field(name: str, kind: type, *, optional: bool = False) -> Any:
        value = record[name]
        if isinstance(value, bool) or not (isinstance(value, kind) or (optional and value is None)):
            raise ValueError(f"{name} is {value!r}")
        return value

    process = Process(
        **{name: field(name, str) for name in ("host", "boot", "namespace")},
        **{name: field(name, int) for name in ("pid", "started")},
    )
    texts = {name: field(name, str, optional=True) for name in ("run", "socket", "address", "token")}
    port = field("port", int, optional=True)
    if (texts["socket"] is None) == (texts["address"] is None or port is None):
        raise ValueError("expected a socket, or an address and a port")
    if texts["address"] is not None and not ipaddress.ip_address(texts["address"]).is_loopback:
        raise ValueError(f"{texts['address']} is not of this machine; use --at and --token-file to go there on purpose")
    since = field("since", float)
    found = Endpoint(job=checked_id(field("job", str)), since=since, process=process, port=port, **texts)
    _check_values(found)
    return found


def _check_values(found: Endpoint) -> None:
    """Refuse what has the type that it should have, and would fail where it is used."""
    process, token = found.process, found.token
    if not math.isfinite(found.since):
        raise ValueError(f"since is {found.since!r}")
    if process.pid < 1 or process.started < 0 or max(process.pid, process.started) >= 2**63:
        raise ValueError(f"there is no process {process.pid} that started at {process.started}")
    if found.port is not None and not 0 < found.port < 65536:
        raise ValueError(f"port is {found.port}")
    if token is not None and not TOKEN.fullmatch(token):
        raise ValueError("the token has other characters than a token has")
    for path in (found.socket, found.run):
        if path is not None and (not os.path.isabs(path) or "\0" in path):
            raise ValueError(f"{path!r} is no path from the root")


def check_directory(path: Path) -> None:
    """See that a directory is the user's, and that nobody else can write to it.

    Raises:
        UnsafeError: It is not, or it is no directory.
    """
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode) or not stat.S_ISDIR(found.st_mode):
        raise UnsafeError(f"{path} is no directory")
    _check_owner(path, found, 0o022)


def _check_owner(path: Path, found: os.stat_result, forbidden: int) -> None:
    if found.st_uid != os.geteuid():
        raise UnsafeError(f"{path} belongs to user {found.st_uid}, and not to {os.geteuid()}")
    if found.st_mode & forbidden:
        mode = stat.S_IMODE(found.st_mode)
        raise UnsafeError(f"{path} has mode {mode:04o}: others could have read or written it")
