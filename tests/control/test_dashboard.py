"""The page: who may use it, what it shows, and that it works in a browser."""

import http.client
import json
import os
import re
import signal
import threading
import time
from http import HTTPStatus

import pytest

import forgather_fn as ff
from forgather_fn.checkpoint import list_checkpoints
from forgather_fn.cli import main
from forgather_fn.control import jobs, serving
from forgather_fn.control.dashboard import data
from forgather_fn.control.dashboard.serving import dashboard
from forgather_fn.reports import Row, jsonl
from tests.control.browser import browser, chromium


@pytest.fixture(autouse=True)
def _no_step_comes(monkeypatch):
    monkeypatch.setattr(serving, "_FRESH", 0.05)


@pytest.fixture
def session():
    with dashboard() as found:
        yield found


class Client:
    """A browser's requests, as they are sent."""

    def __init__(self, session):
        self.session, self.host, self.cookie = session, f"127.0.0.1:{session.port}", None

    def send(self, method="GET", target="/", body=None, **headers):
        """Give the status, the headers and the body of the answer; a header that is None is left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.session.port, timeout=30)
        named = {"host": self.host, "cookie": self.cookie}
        if method == "POST":
            named |= {"origin": f"http://{self.host}", "content-type": "application/json"}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in named.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    def open(self):
        """Exchange the token for the cookie, as a browser does."""
        status, headers, _ = self.send(target=self.session.address.partition(self.host)[2])
        assert status == HTTPStatus.SEE_OTHER
        self.cookie = headers["Set-Cookie"].partition(";")[0]
        return headers


@pytest.fixture
def client(session):
    found = Client(session)
    found.open()
    return found


ORDER = b'{"command": "save"}'


class TestWhoMayUseIt:
    def test_the_address_opens_the_page_once(self, session):
        client = Client(session)
        address = session.address
        headers = client.open()
        assert headers["Location"] == "/"
        assert "; HttpOnly; SameSite=Strict; Path=/" in headers["Set-Cookie"]
        assert client.send()[0] == 200
        target = address.partition(client.host)[2]
        assert client.send(target=target, cookie=None)[0] == 403
        assert "None" in session.address

    @pytest.mark.parametrize("target", ["/?token=", "/?token=x", "/?x=1", "/?token=a&token=b"])
    def test_another_token_does_not(self, session, target):
        assert Client(session).send(target=target)[0] == 403

    def test_of_many_at_once_one_gets_in(self, session):
        client = Client(session)
        target, found = session.address.partition(client.host)[2], []
        threads = [threading.Thread(target=lambda: found.append(client.send(target=target)[0])) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [303] + [403] * 5

    @pytest.mark.parametrize("target", ["/", "/api/jobs", "/api/jobs/a"])
    @pytest.mark.parametrize("cookie", [None, "", "x", "forgather-1=x", "NAME=", "NAME=x", "NAME=VALUE; NAME=VALUE"])
    def test_nothing_without_the_cookie(self, client, target, cookie):
        name, _, value = client.cookie.partition("=")
        cookie = cookie and cookie.replace("NAME", name).replace("VALUE", value)
        assert client.send(target=target, cookie=cookie)[0] == 401
        assert client.send("POST", target, ORDER, cookie=cookie)[0] == 401

    @pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost", None])
    def test_another_host_is_refused(self, client, session, host):
        assert client.send(host=host)[0] == 421
        assert Client(session).send(target="/?token=x", host=host)[0] == 421

    @pytest.mark.parametrize(
        "origin",
        [
            None,
            "null",
            "http://evil.example",
            "http://127.0.0.1",
            "https://HOST",
            "http://HOST.evil.example",
            "http://localhost:1",
        ],
    )
    def test_what_changes_something_needs_the_pages_origin(self, client, origin):
        origin = origin and origin.replace("HOST", client.host)
        status, _, body = client.send("POST", "/api/jobs/a", ORDER, origin=origin)
        assert (status, json.loads(body)) == (
            403,
            {"error": "this is not a request of the page: its Origin is another"},
        )

    @pytest.mark.parametrize("site", ["cross-site", "same-site"])
    def test_another_sites_requests_are_refused(self, client, site):
        assert client.send(target="/api/jobs", sec_fetch_site=site)[0] == 403

    @pytest.mark.parametrize(
        ("status", "changes"),
        [
            (415, {"content_type": "text/plain"}),
            (415, {"content_type": None}),
            (400, {"body": b"{"}),
            (400, {"body": b'{"command": 1}'}),
            (409, {"body": b'{"command": "exec"}'}),
            (413, {"body": b" " * 5000}),
            (409, {"target": "/api/jobs/.."}),
            (409, {"target": "/api/jobs/%2e%2e"}),
            (404, {"target": "/api/jobs/../../x"}),
            (404, {"target": "/"}),
            (405, {"target": "/api/jobs/a?x=1"}),
            (405, {"method": "DELETE"}),
        ],
    )
    def test_what_is_no_order_is_refused(self, client, status, changes):
        assert client.send(**{"method": "POST", "target": "/api/jobs/a", "body": ORDER, **changes})[0] == status

    @pytest.mark.parametrize("target", ["/page.html", "/../session.py", "/api", "/api/jobs/", "/favicon.ico", "//evil"])
    def test_there_are_no_other_pages(self, client, target):
        assert client.send(target=target)[0] in (404, 409)

    def test_nothing_but_its_own_script_may_run(self, client):
        _, headers, body = client.send()
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        (nonce,) = set(re.findall(r'nonce="([^"]+)"', body.decode()))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == f"'nonce-{nonce}'"
        assert policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert (headers["X-Frame-Options"], headers["Referrer-Policy"]) == ("DENY", "no-referrer")
        assert nonce not in client.send()[2].decode()

    def test_the_page_is_one_file_and_puts_in_nothing_but_text(self, client):
        page = client.send()[2].decode()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|DOMParser|\bsrc=|url\(|@import", page
        )
        assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}


def logged(job):
    """Start a process that trains, and wait until it has logged."""
    started = job()
    started.endpoint()
    deadline = time.monotonic() + 30
    while not data.curves(started.run / "metrics.jsonl"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return started


class TestWhatItShows:
    def test_jobs(self, client, tmp_path):
        with ff.serve(tmp_path / "a"):
            status, _, body = client.send(target="/api/jobs")
        assert status == 200
        assert json.loads(body) == [{"job": "a", "state": "running", "run": str(tmp_path / "a"), "fault": None}]

    def test_a_job_with_its_curves_and_checkpoints(self, client, job):
        started = logged(job)
        status, _, body = client.send("POST", "/api/jobs/a", ORDER)
        assert status == 200
        saved = json.loads(body)
        assert saved["paths"] == [str(started.run / "checkpoints" / f"checkpoint-{saved['step']}")]
        found = json.loads(client.send(target="/api/jobs/a")[2])
        assert found["status"]["step"] >= saved["step"]
        assert [one["step"] for one in found["checkpoints"]] == [saved["step"]]
        assert {"loss", "learning_rate"} <= set(found["curves"])
        assert json.loads(client.send("POST", "/api/jobs/a", b'{"command": "stop"}')[2])["command"] == "stop"
        assert started.end() == 0
        assert client.send("POST", "/api/jobs/a", ORDER)[0] == 409

    def test_a_dead_job_is_still_shown(self, client, job):
        started = logged(job)
        os.kill(started.process.pid, signal.SIGKILL)
        started.end()
        found = json.loads(client.send(target="/api/jobs/a")[2])
        assert found["status"] is None
        assert "is dead" in found["error"]
        assert found["curves"]["loss"]

    def test_a_job_that_must_not_be_used_is_not(self, client, tmp_path):
        with ff.serve(tmp_path / "a"):
            (jobs.jobs_directory() / "a" / "endpoint.json").chmod(0o644)
            (found,) = json.loads(client.send(target="/api/jobs")[2])
            assert (found["state"], found["run"]) == ("refused", None)
            assert client.send(target="/api/jobs/a")[0] == 409

    def test_curves_are_thinned_and_gaps_kept(self, tmp_path):
        log = jsonl(tmp_path / "metrics.jsonl")
        for step in range(1, 5001):
            log(Row(step=step, samples=step, seconds=1.0, values={"loss": float("nan") if step == 1 else 1.0}))
        log.close()
        (curve,) = data.curves(tmp_path / "metrics.jsonl").values()
        assert curve[0] == (1, None)
        assert curve[-1] == (5000, 1.0)
        assert len(curve) <= data.POINTS + 1

    @pytest.mark.parametrize("text", [None, "", "no rows\n", "\xff"])
    def test_what_cannot_be_read_gives_no_curves(self, tmp_path, text):
        if text is not None:
            (tmp_path / "metrics.jsonl").write_text(text, encoding="latin-1")
        assert data.curves(tmp_path / "metrics.jsonl") == {}


def test_the_command_prints_the_address_and_ends_by_ctrl_c(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("forgather_fn.control.dashboard.cli._wait", interrupted)
    assert main(["dashboard"]) == 0
    assert re.match(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{40,}\n", capsys.readouterr().out)


def test_a_port_that_is_taken_is_told(session, capsys):
    assert main(["dashboard", "--port", str(session.port)]) == 2
    assert "cannot be used: Address already in use" in capsys.readouterr().err
    assert main(["dashboard", "--port", "70000"]) == 2


@pytest.mark.skipif(chromium() is None, reason="there is no Chromium here: apt-get install chromium")
class TestInABrowser:
    @pytest.fixture
    def page(self, session, tmp_path):
        with browser(chromium(), str(tmp_path / "profile")) as found:
            found.session_address = session.address
            yield found

    def shown(self, page, name):
        return page.value(f"document.getElementById({name!r}).innerText")

    def test_it_shows_a_job_and_commands_it_with_the_keyboard(self, page, job):
        started = job()
        started.endpoint()
        page.open(page.session_address)
        assert page.value("location.search") == ""
        assert page.value("document.cookie") == ""  # which scripts cannot read
        page.until("document.getElementById('status').innerText.includes('Learning rate')")
        assert self.shown(page, "name") == "a"
        assert f"of {10**6}" in self.shown(page, "status")
        page.until("document.querySelectorAll('#losses polyline.loss').length > 0")
        page.until("document.querySelectorAll('#rates polyline.learning_rate').length > 0")
        # By the keyboard: the job, then the first command.
        page.value("document.activeElement.blur()")
        page.press("Tab", 9)
        assert page.value("document.activeElement.dataset.job") == "a"
        page.press("Tab", 9)
        assert page.value("document.activeElement.dataset.command") == "save"
        page.press("Enter", 13, "\r")
        page.until("document.getElementById('answer').innerText.startsWith('save: done at step')")
        page.until("document.querySelectorAll('#checkpoints tr').length === 1")
        assert len(list_checkpoints(started.run)) == 1
        # What ends a run asks first, and No is what the focus is on.
        for _ in range(2):
            page.press("Tab", 9)
        assert page.value("document.activeElement.dataset.command") == "stop"
        page.press("Enter", 13, "\r")
        assert page.value("document.getElementById('dialog').open")
        assert page.value("document.activeElement.id") == "no"
        page.press("Escape", 27)
        assert not page.value("document.getElementById('dialog').open")
        assert page.value("document.activeElement.dataset.command") == "stop"
        assert started.process.is_alive()
        page.press("Enter", 13, "\r")
        page.press("Tab", 9)
        page.press("Enter", 13, "\r")
        page.until("document.getElementById('answer').innerText.startsWith('stop: done at step')")
        assert started.end() == 0
        assert all(one.startswith(("http://127.0.0.1:", "about:")) for one in page.requested())
        page.until("document.getElementById('error').innerText === 'The job has ended.'")
        assert page.value("document.querySelectorAll('[data-command]:disabled').length") == 5
        gone = "409 (Conflict)"  # of a look at the job while it ended
        assert [one for one in page.complaints() if gone not in one] == []

    def test_what_a_run_says_is_text(self, page, tmp_path):
        hostile = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
        with ff.serve(tmp_path / hostile.replace("/", "_"), job_id="hostile") as inbox:
            inbox.last_error = hostile
            page.open(page.session_address)
            page.until("document.getElementById('status').innerText.includes('onerror')")
            assert hostile in self.shown(page, "status")
            assert "onerror" in self.shown(page, "run")
            assert page.value("document.querySelectorAll('img, main script').length") == 0
            assert page.value("document.title") == "hostile - forgather"
            assert page.complaints() == []

    def test_markup_could_not_be_put_in_and_nothing_be_fetched_from_elsewhere(self, page):
        page.open(page.session_address)
        refused = page.value("(() => { try { document.body.innerHTML = '<b>x</b>' } catch (e) { return e.name } })()")
        assert refused == "TypeError"
        refused = page.value("fetch('http://127.0.0.1:9/').then(() => 'sent', (e) => e.message)")
        assert refused == "Failed to fetch"
        assert any("Content Security Policy" in one for one in page.complaints())

    def test_another_page_cannot_command(self, page, session, tmp_path):
        with ff.serve(tmp_path / "a") as inbox:
            page.open(page.session_address)
            page.open("data:text/html,<title>evil</title>")
            sent = f"""fetch('http://127.0.0.1:{session.port}/api/jobs/a', {{method: 'POST', credentials: 'include',
                body: '{{"command": "abort"}}'}}).then((r) => r.status, (e) => e.message)"""
            assert page.value(sent) == "Failed to fetch"
            time.sleep(0.1)
            assert inbox.waiting() == ()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_can_be_read_in_either_scheme(self, page, tmp_path, scheme):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        with ff.serve(tmp_path / "a") as inbox:
            inbox.last_error = "something"
            page.open(page.session_address)
            page.until("document.getElementById('status').innerText.includes('something')")
            colours = "(e, p) => getComputedStyle(e).getPropertyValue(p).match(/[0-9.]+/g).slice(0, 3).map(Number)"
            pairs = page.value(
                f"""(() => {{ const of = {colours};
                const paper = of(document.body, 'background-color');
                return ['h1', 'dt', 'dd', '.soft', '.alarm', 'th']
                    .map((s) => [s, of(document.querySelector(s), 'color'), paper]) }})()"""
            )
            for name, ink, paper in pairs:
                assert contrast(ink, paper) >= 4.5, (scheme, name, ink, paper)
            assert (sum(pairs[0][2]) < 200) == (scheme == "dark")


def contrast(one, other):
    """Compare two colours as the WCAG does: 1 is none, 21 is black on white."""

    def luminance(colour):
        linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
