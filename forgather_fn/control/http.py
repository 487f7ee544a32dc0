"""The little of HTTP that is needed: one request and one answer to a connection, strict in what is taken.

RFC 9112 lets a server refuse what it does not need: chunked bodies, folded lines, absolute targets, repeated headers.
"""

import json
import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import attrs

HEAD_LIMIT: Final = 8192
"""Bytes of a request's line and headers."""
BODY_LIMIT: Final = 4096
"""Bytes of a request's body."""

_LINE: Final = re.compile(rb"([A-Z]{1,16}) (/[\x21-\x7e]{0,2000}) HTTP/1\.[01]")
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]*?)[ \t]*")


class Refused(Exception):
    """A request is not answered as it wishes.

    Attributes:
        status: Of HTTP.
        reason: In one line.
    """

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@attrs.frozen
class Request:
    """What a client sent.

    Attributes:
        method: ``GET``, ``POST``, ...
        target: The path, as it was sent, with its query.
        headers: By their names in lower case.
        body: At most 4096 bytes.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""


@attrs.frozen
class Response:
    """What a client is sent.

    Attributes:
        status: Of HTTP.
        body: The content.
        type: Its media type.
        headers: More of them.
    """

    status: HTTPStatus
    body: bytes
    type: str = "application/json"
    headers: Mapping[str, str] = attrs.field(factory=dict)

    def encode(self) -> bytes:
        """Write it as it is sent."""
        headers = {
            "Content-Type": self.type,
            "Content-Length": str(len(self.body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Connection": "close",
            **self.headers,
        }
        assert not any("\r" in part or "\n" in part for pair in headers.items() for part in pair)
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + self.body


def as_json(status: HTTPStatus, value: Any, **headers: str) -> Response:
    """Answer with a value as JSON; floats that JSON has not are ``"nan"``, ``"inf"`` or ``"-inf"``."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Response(status, json.dumps(_plain(value), allow_nan=False, default=str).encode() + b"\n", headers=named)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def refusal(error: Refused) -> Response:
    """Answer that something was refused, and why."""
    return as_json(error.status, {"error": error.reason})


def parse_head(data: bytes) -> Request:
    r"""Read a request's line and headers.

    Args:
        data: Up to and with the empty line.

    Raises:
        Refused: It is not a request, or not one that is needed.

    Example:
        >>> parse_head(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n").headers
        {'host': 'localhost'}
    """
    first, *rest = data.removesuffix(b"\r\n\r\n").split(b"\r\n")
    line = _LINE.fullmatch(first)
    if line is None:
        raise Refused(HTTPStatus.BAD_REQUEST, "this is not a request of HTTP/1.1")
    headers: dict[str, str] = {}
    for one in rest:
        header = _HEADER.fullmatch(one)
        if header is None:
            raise Refused(HTTPStatus.BAD_REQUEST, "a header cannot be read")
        name = header[1].decode().lower()
        if name in headers:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the header {name} comes twice")
        headers[name] = header[2].decode()
    return Request(line[1].decode(), line[2].decode(), headers)


def body_length(request: Request) -> int:
    """Tell how many bytes follow the headers.

    Raises:
        Refused: That is not said, or is too much.
    """
    if "transfer-encoding" in request.headers:
        raise Refused(HTTPStatus.NOT_IMPLEMENTED, "a body is sent with its Content-Length, not in chunks")
    text = request.headers.get("content-length")
    if text is None:
        if request.method == "POST":
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a body is sent with its Content-Length")
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise Refused(HTTPStatus.BAD_REQUEST, "the Content-Length is no number")
    if int(text) > BODY_LIMIT:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {BODY_LIMIT} bytes")
    return int(text)
