"""Serving a run: from the beginning of a block to its end, it can be controlled from outside."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http import HTTPStatus
from pathlib import Path
from typing import Final

import attrs

from forgather_fn.control import endpoint as endpoints
from forgather_fn.control import jobs
from forgather_fn.control.access import Access, admit, order_of
from forgather_fn.control.command import ControlError, checked_id
from forgather_fn.control.endpoint import Endpoint
from forgather_fn.control.http import Refused, Request, Response, as_json
from forgather_fn.control.inbox import Inbox, Reply
from forgather_fn.control.process import this_process
from forgather_fn.control.server import Respond, start
from forgather_fn.control.status import status

logger = logging.getLogger(__name__)

PATH_LIMIT: Final = 107
"""Bytes that the path of a Unix socket may have."""
TOKEN_LENGTH: Final = 16
"""Characters that a token has at least."""
_ATTEMPTS: Final = 20
_UNATTENDED: Final = 30.0  # seconds that a command waits for something in the run that looks at it
_FRESH: Final = 0.5  # seconds that a status waits for the numbers of the next step


@contextlib.contextmanager
def serve(
    run: str | os.PathLike[str] | None = None,
    *,
    job_id: str | None = None,
    host: str | None = None,
    port: int | None = None,
    token: str | None = None,
    remote: bool = False,
) -> Iterator[Inbox]:
    """Let a run be controlled from outside, for the time of a block.

    It is reached by a Unix socket that its user alone can open; with a host or a port, by TCP on this machine, with a
    token. Where it cannot be served (no disk space, no home, the id is taken), there is one warning, and the run goes
    on without. Of several processes the first one serves.

    Args:
        run: The run directory, which names the job and where its checkpoints are.
        job_id: The job's id; None for the name of the run directory, with a number where another job has it.
        host: An IP address of this machine; None for 127.0.0.1, where a port is given.
        port: The port; 0 for one that is free.
        token: What clients must show over TCP, at least 16 characters; None for a new one, which is in the job's
            endpoint file.
        remote: Allow a host that other machines reach. Nothing is encrypted: a tunnel of ssh to a Unix socket or to
            127.0.0.1 is better. It needs a token.

    Returns:
        The inbox, for :func:`~forgather_fn.control.stage.controlled`.

    Raises:
        ValueError: The id, host or token cannot be used.

    Example:
        >>> import forgather_fn as ff
        >>> with ff.serve("runs/a") as inbox:  # doctest: +SKIP
        ...     toolz.pipe(program.steps(state, data), ff.every(200, ff.saved("runs/a")), ff.controlled(inbox), ff.last)
    """
    _check_types(run=run, job_id=job_id, host=host, port=port, token=token)
    place = _place(host, port, token, remote)
    name = checked_id(job_id) if job_id is not None else _name(run)
    inbox = Inbox(Path(run).resolve() if run is not None else None)
    with contextlib.ExitStack() as stack:
        if _rank() == 0:
            try:
                _enter(stack, lambda: _served(inbox, place, name, exact=job_id is not None))
            except (OSError, RuntimeError, ControlError) as error:
                logger.warning("the run cannot be controlled from outside, and goes on without: %s", error)
        try:
            yield inbox
        finally:
            inbox.end("the run has ended")


def _enter(stack: contextlib.ExitStack, served: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Serve; again, where another job took the id in between, which only so many jobs that begin at once can do."""
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(jobs.TakenError):
            stack.enter_context(served())
            return
    stack.enter_context(served())


@attrs.frozen
class _Place:
    """Where a TCP server listens."""

    address: str
    port: int
    token: str = attrs.field(repr=False)


def _check_types(*, run: object, **given: object) -> None:
    for name, value in given.items():
        kind = int if name == "port" else str
        if value is not None and type(value) is not kind:
            shown = type(value).__name__ if name == "token" else repr(value)  # a secret is not for messages
            raise ValueError(f"serve: {name}: expected {kind.__name__}, or None; got {shown}")
    if run is not None and (not isinstance(run, str | os.PathLike) or "\0" in str(run)):
        raise ValueError(f"serve: run={run!r}: expected the path of a run directory, or None")


def _place(host: str | None, port: int | None, token: str | None, remote: bool) -> _Place | None:
    if token is not None and (len(token) < TOKEN_LENGTH or not re.fullmatch(r"[\x21-\x7e]+", token)):
        raise ValueError(
            f"serve: a token has at least {TOKEN_LENGTH} characters, printable ones of ASCII without spaces"
        )
    if host is None and port is None:
        if token is not None or remote:
            raise ValueError("serve: token and remote are for TCP: give a port too (0 for a free one)")
        return None
    try:
        address = ipaddress.ip_address("127.0.0.1" if host in (None, "localhost") else host or "")
    except ValueError:
        raise ValueError(f"serve: host={host!r}: expected an IP address of this machine, such as 127.0.0.1") from None
    if address.is_unspecified:
        raise ValueError(f"serve: host={host!r} stands for all addresses; give the one that clients use")
    if not address.is_loopback and not (remote and token is not None):
        raise ValueError(
            f"serve: host={host!r} is reached by other machines. If that is meant, give remote=True and a token; "
            "better, leave it out and use ssh to come here"
        )
    if port is not None and not 0 <= port <= 65535:
        raise ValueError(f"serve: port={port} is not between 0 and 65535")
    return _Place(str(address), port or 0, token if token is not None else secrets.token_urlsafe(32))


def _name(run: str | os.PathLike[str] | None) -> str:
    """Make an id of the name of a run directory."""
    given = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(run).resolve().name if run is not None else "")
    return given.lstrip("_.-")[:64] or "job"


def _rank() -> int:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    given = os.environ.get("RANK", "0")
    if not re.fullmatch(r"[0-9]{1,9}", given):
        raise ValueError(f"serve: RANK={given!r} in the environment: expected the number of this process")
    return int(given)


@contextlib.contextmanager
def _served(inbox: Inbox, place: _Place | None, name: str, *, exact: bool) -> Iterator[None]:
    """Make the job's directory and its server; nothing is left behind, however far that gets."""
    with contextlib.ExitStack() as stack:
        directory = jobs.make_jobs_directory()
        with jobs.claimed(directory, name, exact=exact) as claim:
            listener, endpoint = _listening(claim, place, inbox, stack)
            endpoints.write(claim.staging, endpoint)
            server = start(listener, _responding(inbox, endpoint), f"control of {claim.job}")
            stack.callback(server.stop)
        stack.callback(jobs.release, claim.home, endpoint.socket)
        inbox.job = claim.job
        if place is not None and not ipaddress.ip_address(place.address).is_loopback:
            logger.warning("the run can be controlled from other machines, over %s, unencrypted", place.address)
        # Whoever waits is answered before the server ends.
        stack.callback(inbox.end, "the run has ended")
        yield


def _listening(
    claim: jobs.Claim, place: _Place | None, inbox: Inbox, stack: contextlib.ExitStack
) -> tuple[socket.socket, Endpoint]:
    common = Endpoint(
        job=claim.job, run=str(inbox.run) if inbox.run else None, since=time.time(), process=this_process(), socket=""
    )
    if place is not None:
        family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
        listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((place.address, place.port))
        port = listener.getsockname()[1]
        return listener, attrs.evolve(common, socket=None, address=place.address, port=port, token=place.token)
    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    path, final = claim.staging / jobs.SOCKET, claim.home / jobs.SOCKET
    if not _bound(listener, path, final):
        path = final = Path(_short_directory(stack)) / "s"
        listener.bind(str(path))
    stack.callback(_unlink, path)
    os.chmod(path, 0o600)
    return listener, attrs.evolve(common, socket=str(final))


def _bound(listener: socket.socket, path: Path, final: Path) -> bool:
    """Bind a socket in the job's directory, if the paths are short enough, and the disk can hold sockets."""
    if max(len(os.fsencode(path)), len(os.fsencode(final))) > PATH_LIMIT:
        return False
    try:
        listener.bind(str(path))
    except OSError:
        return False
    return True


def _short_directory(stack: contextlib.ExitStack) -> str:
    """Make a directory whose name is short enough for a socket in it."""
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if parent and len(os.fsencode(parent)) + len(jobs.SHORT) + 16 <= PATH_LIMIT and os.path.isdir(parent):
            short = tempfile.mkdtemp(prefix=jobs.SHORT, dir=parent)
            stack.callback(_rmdir, short)
            return short
    raise OSError("no directory is short enough for a socket in it; set XDG_RUNTIME_DIR or TMPDIR to one")


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _rmdir(path: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _responding(inbox: Inbox, endpoint: Endpoint) -> Respond:
    """Answer requests of clients from the inbox."""
    access = Access(_hosts(endpoint), endpoint.token)

    async def respond(request: Request) -> Response:
        admit(request, access)
        if request.method == "GET":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(inbox.look()), _FRESH)  # which cancels what comes too late
            return as_json(HTTPStatus.OK, status(inbox, endpoint))
        order = order_of(request)
        answer: Future[Reply] = inbox.post(order.command)
        if not order.wait:
            return as_json(HTTPStatus.ACCEPTED, {"command": str(order.command), "accepted": True})
        try:
            # Shielded: whoever hangs up has still asked.
            waited = asyncio.shield(asyncio.wrap_future(answer))
            await asyncio.wait([waited], timeout=_UNATTENDED)
            if (unattended := inbox.unattended) is not None:
                raise Refused(HTTPStatus.CONFLICT, f"{order.command}: {unattended}. It stays asked for")
            reply: Reply = await waited
            return as_json(HTTPStatus.OK, reply)
        except ControlError as error:
            raise Refused(HTTPStatus.CONFLICT, str(error)) from None

    return respond


def _hosts(endpoint: Endpoint) -> frozenset[str]:
    if endpoint.address is None:
        return frozenset({"localhost"})
    address = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
    names = {address, "localhost"} if ipaddress.ip_address(endpoint.address).is_loopback else {address}
    return frozenset(f"{name}:{endpoint.port}" for name in names)
