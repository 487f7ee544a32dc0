"""A browser without a window, told what to do over a pipe by the protocol of its developer tools."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any


def chromium() -> str | None:
    """Find it, as Debian and others name it."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a browser.

    Attributes:
        told: What the browser said by itself: errors, logs, requests.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", read: int, write: int) -> None:
        self.process, self.read, self.write = process, read, write
        self.told: list[dict[str, Any]] = []
        self.number, self.buffer, self.session = 0, b"", ""
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Ask for something, and give the answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self.number:
            self.told.append(found)
        assert "error" not in found, found
        return found["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], 30)[0], "the browser does not answer"
            part = os.read(self.read, 1 << 16)
            assert part, "the browser has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def value(self, expression: str) -> Any:
        """Give what an expression of JavaScript is."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> Any:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, (
                f"{expression} did not come true:\n{self.value('document.body.innerText')}"
            )
            time.sleep(0.05)
        return found

    def open(self, address: str) -> None:
        """Go to an address, and wait until it is loaded."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def complaints(self) -> list[str]:
        """Give the errors of scripts, and what the content policy has refused."""
        self.value("1")
        thrown = [
            one["params"]["exceptionDetails"] for one in self.told if one.get("method") == "Runtime.exceptionThrown"
        ]
        logged = [one["params"]["entry"] for one in self.told if one.get("method") == "Log.entryAdded"]
        return [str(one) for one in thrown] + [one["text"] for one in logged if one["level"] == "error"]

    def requested(self) -> set[str]:
        """Give the addresses that were asked for."""
        sent = [one["params"] for one in self.told if one.get("method") == "Network.requestWillBeSent"]
        return {one["request"]["url"] for one in sent}


@contextlib.contextmanager
def browser(program: str, profile: str) -> Iterator[Browser]:
    """Start a browser with a page."""
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{their_read} 4>&{their_write}', program, *options]
    process = subprocess.Popen(
        [*command, "--remote-debugging-pipe"],
        pass_fds=(their_read, their_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_read)
    os.close(their_write)
    try:
        yield Browser(process, our_read, our_write)
    finally:
        process.kill()
        process.wait()
        os.close(our_read)
        os.close(our_write)
