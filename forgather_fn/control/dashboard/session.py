"""Who may use the page: whoever was given its address, in one browser."""

import hmac
import secrets
import threading
from http import HTTPStatus

import attrs

from forgather_fn.control.http import Refused, Request, Response


@attrs.define(eq=False)
class Session:
    """One browser's use of the page.

    The address that is printed has a token that works once: it is exchanged for a cookie that scripts cannot read and
    that no other site's page can have sent. So neither history, nor a log, nor a look at the screen afterwards is worth
    anything.

    Attributes:
        port: Of the server; in the cookie's name, since cookies do not tell ports apart.
    """

    port: int
    _token: str | None = attrs.field(factory=lambda: secrets.token_urlsafe(32), repr=False)
    _secret: str = attrs.field(factory=lambda: secrets.token_urlsafe(32), repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    @property
    def address(self) -> str:
        """The address that opens the page, once."""
        return f"http://127.0.0.1:{self.port}/?token={self._token}"

    @property
    def cookie(self) -> str:
        """The name of the cookie."""
        return f"forgather-{self.port}"

    def hosts(self) -> frozenset[str]:
        """Give what the Host header may be."""
        return frozenset({f"127.0.0.1:{self.port}", f"localhost:{self.port}"})

    def exchanged(self, token: str) -> Response:
        """Exchange the token for a cookie, and lead to the page without it.

        Raises:
            Refused: It is not the token, or has been used.
        """
        with self._lock:
            if self._token is None or not hmac.compare_digest(token.encode(), self._token.encode()):
                raise Refused(HTTPStatus.FORBIDDEN, "this address has been used, or is wrong; start the dashboard anew")
            self._token = None
        attributes = "; HttpOnly; SameSite=Strict; Path=/"
        headers = {"Location": "/", "Set-Cookie": f"{self.cookie}={self._secret}{attributes}"}
        return Response(HTTPStatus.SEE_OTHER, b"", "text/plain", {**headers, "Referrer-Policy": "no-referrer"})

    def admit(self, request: Request) -> None:
        """Let through what the browser sends that has the cookie; what changes something, from the page alone.

        Raises:
            Refused: It is something else.
        """
        self.check_host(request)
        if not self._has_cookie(request.headers.get("cookie", "")):
            raise Refused(HTTPStatus.UNAUTHORIZED, "open the address that forgather dashboard printed")
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Refused(HTTPStatus.FORBIDDEN, "this is another site's request")
        if request.method == "POST" and request.headers.get("origin") != f"http://{request.headers['host']}":
            raise Refused(HTTPStatus.FORBIDDEN, "this is not a request of the page: its Origin is another")

    def check_host(self, request: Request) -> None:
        """Refuse an address that leads here by another name."""
        if request.headers.get("host") not in self.hosts():
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "the Host is not this server's")

    def _has_cookie(self, header: str) -> bool:
        given = [part.strip().partition("=") for part in header.split(";")]
        mine = [value for name, _, value in given if name == self.cookie]
        return len(mine) == 1 and hmac.compare_digest(mine[0].encode(), self._secret.encode())
