"""The page's server."""

import asyncio
import contextlib
import importlib.resources
import secrets
import socket
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

from forgather_fn.control.access import json_object
from forgather_fn.control.command import ControlError, checked_id
from forgather_fn.control.dashboard import data
from forgather_fn.control.dashboard.session import Session
from forgather_fn.control.http import Refused, Request, Response, as_json
from forgather_fn.control.server import Respond, start

_HEADERS = {
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


@contextlib.contextmanager
def dashboard(port: int = 0) -> Iterator[Session]:
    """Serve the page on 127.0.0.1 for the time of a block.

    Args:
        port: The port; 0 for one that is free.

    Returns:
        The session, whose address opens the page once.

    Raises:
        OSError: The port is taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        session = Session(listener.getsockname()[1])
        server = start(listener, responding(session), "dashboard")
        try:
            yield session
        finally:
            server.stop()


def responding(session: Session) -> Respond:
    """Answer the requests of the page."""

    async def respond(request: Request) -> Response:
        place = urlsplit(request.target)
        if request.method == "GET" and place.path == "/" and place.query:
            session.check_host(request)
            return session.exchanged(parse_qs(place.query).get("token", [""])[0])
        session.admit(request)
        if place.query or request.method not in ("GET", "POST"):
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "there are GET and POST, without a query")
        if request.method == "GET" and place.path == "/":
            return page()
        if request.method == "GET" and place.path == "/api/jobs":
            return await _answered(data.job_list)
        first, _, job = place.path.rpartition("/")
        if first != "/api/jobs":
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such page")
        if request.method == "GET":
            return await _answered(lambda: data.job_details(checked_id(job)))
        name = json_object(request).get("command")
        if not isinstance(name, str):
            raise Refused(HTTPStatus.BAD_REQUEST, 'expected {"command": NAME}')
        return await _answered(lambda: data.command(checked_id(job), name))

    return respond


async def _answered(function: Callable[[], Any]) -> Response:
    """Give what a function finds, which may take its time."""
    try:
        return as_json(HTTPStatus.OK, await asyncio.to_thread(function), **_HEADERS)
    except ControlError as error:
        raise Refused(HTTPStatus.CONFLICT, str(error)) from None


def page() -> Response:
    """Give the page: nothing in it may come from elsewhere, and no script but its own may run."""
    nonce = secrets.token_urlsafe(16)
    text = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": f"'nonce-{nonce}'",
        "style-src": f"'nonce-{nonce}'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    headers = {**_HEADERS, "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items())}
    body = text.replace("{{nonce}}", nonce).encode()
    return Response(HTTPStatus.OK, body, "text/html; charset=utf-8", headers)
