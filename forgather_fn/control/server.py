"""A small server in a thread of its own: few connections, each for one request, none for longer than it needs.

What a slow or silent client can take is bounded: a request is read within five seconds, at most eight connections are
held, and a new one ends the oldest of those that have not sent their request yet.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any, Final, Protocol

import attrs

from forgather_fn.control.http import HEAD_LIMIT, Refused, Request, Response, body_length, parse_head, refusal

logger = logging.getLogger(__name__)

SECONDS: Final = 5.0
"""For reading a request, and for writing an answer."""
CONNECTIONS: Final = 8
_LINGER: Final = 2.0  # seconds that answers may take when the server ends
_FAREWELL: Final = 1.0  # seconds that a client may take to close after its answer

_listening: set[socket.socket] = set()


def _let_go() -> None:
    """Close, in a child that was just forked, the sockets of its parent: a worker must not keep a dead job's open."""
    while _listening:
        with contextlib.suppress(OSError):
            os.close(_listening.pop().detach())


os.register_at_fork(after_in_child=_let_go)


class Respond(Protocol):
    """Answer a request."""

    def __call__(self, request: Request, /) -> Coroutine[Any, Any, Response]:
        """Give the answer; it is cancelled when the client hangs up.

        Raises:
            Refused: The request is refused, which is answered.
        """
        ...


@attrs.frozen(eq=False)
class Server:
    """A server that runs.

    Attributes:
        stop: Take no more connections, let answers that are ready be sent, and end. A second call does nothing.
    """

    stop: Callable[[], None]


def start(listener: socket.socket, respond: Respond, name: str) -> Server:
    """Serve a socket that is bound, in a thread of its own.

    Args:
        listener: Closed by the server when it ends.
        respond: Answers requests, in the server's thread.
        name: Of the thread.

    Raises:
        OSError: There are too few resources for it.
        RuntimeError: No thread can be started.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    def work() -> None:
        try:
            asyncio.run(_serve(listener, respond, started))
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            else:
                logger.warning("%s ended: %s: %s", name, type(error).__name__, error)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    loop, ending = started.result()

    def stop() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(ending.set)
        thread.join(2 * _LINGER)

    return Server(stop)


async def _serve(
    listener: socket.socket, respond: Respond, started: "Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]"
) -> None:
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    loop.set_exception_handler(lambda loop, context: logger.debug("%s", context))
    connections = _Connections(respond)
    listener.setblocking(False)
    _listening.add(listener)
    try:
        server = await asyncio.start_server(connections.serve, sock=listener, limit=HEAD_LIMIT, backlog=64)
        started.set_result((loop, ending))
        await ending.wait()
        server.close()
        await connections.finish()
    finally:
        _listening.discard(listener)


@attrs.define(eq=False)
class _Connections:
    """Those that are open."""

    respond: Respond
    reading: dict["asyncio.Task[None]", None] = attrs.field(factory=dict)  # oldest first
    answering: set["asyncio.Task[None]"] = attrs.field(factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, whatever comes, and close it."""
        task = asyncio.current_task()
        assert task is not None
        if len(self.reading) + len(self.answering) >= CONNECTIONS and self.reading:
            oldest = next(iter(self.reading))
            del self.reading[oldest]
            oldest.cancel()
        self.reading[task] = None
        try:
            answer = await self._answer(task, reader, writer)
            if answer is not None:
                async with asyncio.timeout(SECONDS):
                    writer.write(answer.encode())
                    await writer.drain()
                    writer.write_eof()
                self.answering.discard(task)
                self.reading[task] = None
                async with asyncio.timeout(_FAREWELL):
                    # Closing with bytes that were not read would take the answer from a client that still sends.
                    while await reader.read(1 << 16):
                        pass
        except (OSError, TimeoutError):
            pass  # it hung up
        finally:
            self.reading.pop(task, None)
            self.answering.discard(task)
            writer.transport.abort()

    async def _answer(
        self, task: "asyncio.Task[None]", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Response | None:
        try:
            _check_peer(writer.get_extra_info("socket"))
            if len(self.reading) + len(self.answering) > CONNECTIONS:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{CONNECTIONS} clients are waiting for answers already")
            async with asyncio.timeout(SECONDS):
                request = await _read(reader)
            del self.reading[task]
            self.answering.add(task)
            return await _unless_hung_up(reader, self.respond(request))
        except Refused as error:
            return refusal(error)
        except TimeoutError:
            return refusal(Refused(HTTPStatus.REQUEST_TIMEOUT, f"the request took more than {SECONDS:g} s"))
        except (asyncio.IncompleteReadError, OSError):
            return None
        except Exception:
            logger.exception("a request could not be answered")
            return refusal(Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "this is an error of the server"))

    async def finish(self) -> None:
        """Let answers be sent, and end the rest."""
        for task in self.reading:
            task.cancel()
        if self.answering:
            await asyncio.wait(set(self.answering), timeout=_LINGER)
        for task in self.answering:
            task.cancel()


async def _read(reader: asyncio.StreamReader) -> Request:
    try:
        request = parse_head(await reader.readuntil(b"\r\n\r\n"))
    except asyncio.LimitOverrunError:
        raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"headers have at most {HEAD_LIMIT} bytes") from None
    length = body_length(request)
    return attrs.evolve(request, body=await reader.readexactly(length)) if length else request


async def _unless_hung_up(reader: asyncio.StreamReader, answer: Coroutine[Any, Any, Response]) -> Response | None:
    """Wait for an answer, or for the client to go, who then needs none."""
    answering = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(reader.read(1))
    try:
        await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        gone.cancel()
        answering.cancel()


def _check_peer(connection: socket.socket) -> None:
    """See that who connects to a Unix socket is this user, or root; the kernel knows."""
    if connection.family != socket.AF_UNIX or sys.platform != "linux":
        return
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if not _allowed(user):
        raise Refused(HTTPStatus.FORBIDDEN, "this is another user's job")


def _allowed(user: int) -> bool:
    return user in (0, os.geteuid())
