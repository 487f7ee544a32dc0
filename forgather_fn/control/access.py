"""Who may ask what: the rules of the control server, in the order in which they are applied."""

import hmac
import json
from http import HTTPStatus
from typing import Any, Final

import attrs

from forgather_fn.control.command import Command
from forgather_fn.control.http import Refused, Request

ROUTES: Final = {"/status": "GET", "/control": "POST"}
_BROWSER: Final = ("origin", "referer", "cookie")


@attrs.frozen
class Access:
    """What a request must show.

    Attributes:
        hosts: What its Host header may be, exactly: a page that has a name of its own resolve to this machine fails.
        token: What its Authorization must bear; None where the socket's permissions say who may connect.
    """

    hosts: frozenset[str]
    token: str | None = attrs.field(default=None, repr=False)


@attrs.frozen
class Order:
    """What a request to ``/control`` asks for.

    Attributes:
        command: Which command.
        wait: Whether the answer is to come when it has happened, or at once.
    """

    command: Command
    wait: bool


def admit(request: Request, access: Access) -> None:
    """Let a request through that comes from a client of this user, to an address that there is.

    Raises:
        Refused: It does not.
    """
    if request.headers.get("host") not in access.hosts:
        raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "the Host is not this server's")
    if any(name in _BROWSER or name.startswith("sec-") for name in request.headers):
        raise Refused(HTTPStatus.FORBIDDEN, "browsers are not served; see forgather dashboard")
    if access.token is not None and not bears(request, access.token):
        raise Refused(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong")
    if request.target not in ROUTES:
        raise Refused(HTTPStatus.NOT_FOUND, f"there are {' and '.join(ROUTES)}")
    if request.method != ROUTES[request.target]:
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{request.target} is for {ROUTES[request.target]}")


def bears(request: Request, token: str) -> bool:
    """Compare the token that a request bears, in a time that does not depend on how much of it is right."""
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


def order_of(request: Request) -> Order:
    """Read the body of a request to ``/control``: ``{"command": "save", "wait": true}``.

    Raises:
        Refused: It is something else.
    """
    fields = json_object(request)
    if set(fields) - {"command", "wait"} or not isinstance(fields.get("wait", True), bool):
        raise Refused(HTTPStatus.BAD_REQUEST, 'expected {"command": NAME, "wait": true or false}')
    known = {str(command): command for command in Command}
    name = fields.get("command")
    if not isinstance(name, str) or name not in known:
        raise Refused(HTTPStatus.BAD_REQUEST, f"unknown command; there are {', '.join(known)}")
    return Order(known[name], fields.get("wait", True))


def json_object(request: Request) -> dict[str, Any]:
    """Read a body that is one JSON object.

    Raises:
        Refused: It is something else, or not said to be JSON. (A page can send other types across origins unasked.)
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a body is sent as application/json")
    try:
        value = json.loads(request.body)
    except (ValueError, RecursionError):
        raise Refused(HTTPStatus.BAD_REQUEST, "the body is not JSON") from None
    if not isinstance(value, dict):
        raise Refused(HTTPStatus.BAD_REQUEST, "the body is not a JSON object")
    return value
