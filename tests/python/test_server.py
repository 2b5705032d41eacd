"""The labelling server attacked (RELIABILITY row 23), each attack as a request, beside the same request without the attack.

What a hostile page in a real browser can do is tested there.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labelling_for_tests import Page, Refused, Served, in_order, new_store, serving
from tutelage.feedback import server as web
from tutelage.feedback.server import HEADERS, MAX_BODY_BYTES, listen


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(new_store(tmp_path / "f.db", count=50)) as found:
        yield found


def ask(
    served: Served, method: str, path: str, headers: dict[str, str | None] | None = None, body: bytes | str = b""
) -> tuple[int, dict[str, str], bytes]:
    """One request with exactly these headers (None: without it) beside those of an honest page."""
    told: dict[str, str | None] = {"Host": f"127.0.0.1:{served.port}", **(headers or {})}
    if isinstance(body, str):
        body = body.encode()
    if method == "POST":
        told = {"Content-Length": str(len(body)), "Content-Type": "application/json", **told}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in told.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def let_in(served: Served, token: str = "the-token") -> dict[str, str | None]:
    """What the browser of a person who opened the address sends with a change."""
    status, headers, _ = ask(served, "GET", f"/?token={token}")
    assert status == 303 and headers["location"] == "/"
    cookie = headers["set-cookie"].partition(";")[0]
    return {"Cookie": cookie, "Origin": f"http://127.0.0.1:{served.port}", "Sec-Fetch-Site": "same-origin"}


NEXT = json.dumps({"labeller": "Ann"})


def events(served: Served) -> int:
    with served.store.locked():
        return int(served.store._connection.execute("SELECT count(*) FROM event").fetchone()[0])


def accepted(served: Served, headers: dict[str, str | None], **others: Any) -> bool:
    """Whether a change is accepted; what is refused must have had no effect."""
    before = events(served)
    status, answered, body = ask(served, "POST", "/api/next", headers, **{"body": NEXT, **others})
    if status == 200:
        return True
    assert events(served) == before and "error" in json.loads(body), (status, body)
    assert answered["content-security-policy"] == HEADERS["Content-Security-Policy"]
    return False


# --- who may come in ----------------------------------------------------------------------------------------------


def test_the_token_works_once(served: Served) -> None:
    for path in ("/", "/page.css", "/label.js", "/api/session", "/api/progress"):
        status, _, body = ask(served, "GET", path)
        assert status == 403 and b"open the address that `tutelage label` has printed" in body
    for token in ("", "no", "the-token%00", "the-toke", "the-token2"):
        status, headers, body = ask(served, "GET", f"/?token={token}")
        assert status == 403 and b"was used before" in body and "set-cookie" not in headers
    assert ask(served, "GET", "/label.js?token=the-token")[0] == 403  # only the page itself takes it
    own = let_in(served)
    status, headers, _ = ask(served, "GET", "/?token=the-token")
    assert status == 403 and "set-cookie" not in headers
    assert ask(served, "GET", "/?token=the-token", own)[0] == 303  # who is in may come back to it
    assert ask(served, "GET", "/", own)[0] == 200
    other = let_in(served, "another-token")
    assert other["Cookie"] != own["Cookie"] and ask(served, "GET", "/", other)[0] == 200


def test_the_cookie(served: Served) -> None:
    _, headers, _ = ask(served, "GET", "/?token=the-token")
    cookie, *attributes = [part.strip() for part in headers["set-cookie"].split(";")]
    assert {"httponly", "samesite=strict", "path=/"} <= {part.lower() for part in attributes}
    assert not any(part.lower().startswith("domain") for part in attributes)
    name, _, value = cookie.partition("=")
    assert name == f"tutelage-{served.port}" and len(value) == 43  # 256 bits
    honest = {"Origin": f"http://127.0.0.1:{served.port}"}
    assert accepted(served, {**honest, "Cookie": cookie})
    for wrong in (None, "", f"{name}=", f"{name}={value[:-1]}", f"{name}={value}x", f"other={value}", f"{name}=the-token"):
        assert not accepted(served, {**honest, "Cookie": wrong})


def test_host(served: Served) -> None:
    own = let_in(served)
    port = served.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}"):
        assert accepted(served, {**own, "Host": host, "Origin": f"http://{host}"})
    # a name that somebody else points here: the browser then says that the request is of the same origin
    for host in (
        f"evil.example:{port}",
        f"127.0.0.1.evil.example:{port}",
        f"localhost.evil.example:{port}",
        "127.0.0.1",
        "localhost",
        f"127.0.0.1:{port + 1}",
        f"0.0.0.0:{port}",
        f"[::1]:{port}",
        f"127.0.0.1:{port}.evil.example",
        f"127.0.0.1:{port}@evil.example",
        "",
    ):
        for method, path in (("POST", "/api/next"), ("GET", "/"), ("GET", "/api/session"), ("GET", "/?token=another-token")):
            before = events(served)
            status, headers, body = ask(served, method, path, {**own, "Host": host, "Origin": f"http://{host}"}, NEXT)
            assert (status, body) == (421, b"this server does not answer to that name\n"), host
            assert "set-cookie" not in headers and events(served) == before
    for head in (b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"):
        assert raw(served, head).split(b"\r\n")[0].split()[1] in (b"400", b"421")


def test_origin(served: Served) -> None:
    own = let_in(served)
    port = served.port
    assert accepted(served, own)
    for origin in (
        None,
        "null",
        "",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1",
        f"http://127.0.0.1:{port + 1}",
        f"http://localhost:{port}",  # another origin than the one that was asked
        "http://evil.example",
        f"http://127.0.0.1:{port}.evil.example",
        f"http://127.0.0.1:{port}/",
    ):
        assert not accepted(served, {**own, "Origin": origin}), origin


def test_sec_fetch_site(served: Served) -> None:
    own = let_in(served)
    assert accepted(served, own)
    assert accepted(served, {**own, "Sec-Fetch-Site": None})  # a browser sends none where it does not trust the address
    for site in ("cross-site", "same-site", "none", "", "Same-Origin x"):
        assert not accepted(served, {**own, "Sec-Fetch-Site": site}), site
    for path in ("/api/session", "/api/progress?labeller=Ann"):
        assert ask(served, "GET", path, own)[0] == 200
        for site in ("cross-site", "same-site", "none"):
            assert ask(served, "GET", path, {**own, "Sec-Fetch-Site": site})[0] == 403


@pytest.mark.parametrize("verb", ["next", "submit", "skip", "undo"])
def test_every_change_is_guarded(served: Served, verb: str) -> None:
    own = let_in(served)
    page = Page(served.address.replace("the-token", "another-token"))
    item = page.next()["item"]
    page.submit(item["id"], in_order(item))
    now = page.next()["item"]
    request = {"labeller": "Ann", "item": now["id"], "submission": "a-submission", "reason": "other", "answer": in_order(now)}
    body = json.dumps({**request, "seconds": 1, "comment": ""})
    page.close()
    before = events(served)
    for attack in (
        {"Cookie": None},
        {"Origin": "http://evil.example"},
        {"Origin": None},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": None},
    ):
        assert ask(served, "POST", f"/api/{verb}", {**own, **attack}, body)[0] in (403, 415, 421), attack
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
        status, headers, _ = ask(served, method, f"/api/{verb}", own, body if method in ("PUT", "PATCH") else b"")
        assert status == 405 and not any(name.startswith("access-control") for name in headers)
    assert events(served) == before
    status, _, found = ask(served, "POST", f"/api/{verb}", own, body)
    assert status == 200 and "item" in json.loads(found)
    assert events(served) > before or verb == "next"  # the item is on the screen already


def test_every_answer_has_the_headers(served: Served) -> None:
    own = let_in(served)
    seen = set()
    for method, path, others in [
        ("GET", "/", own),
        ("GET", "/label.js", own),
        ("GET", "/", {}),
        ("GET", "/?token=no", {}),
        ("GET", "/nothing", own),
        ("GET", "/", {"Host": "evil.example"}),
        ("GET", "/api/session", own),
        ("GET", "/api/session?labeller=%00", own),
        ("POST", "/api/next", own),
        ("POST", "/api/next", {}),
        ("POST", "/", own),
    ]:
        status, headers, _ = ask(served, method, path, others, b"{}" if method == "POST" else b"")
        seen.add(status)
        for name, value in HEADERS.items():
            assert headers[name.lower()] == value, (path, name)
        assert "server" not in headers
    assert {200, 403, 404, 405, 421, 422} <= seen
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy and "http" not in policy
    for directive in ("frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'", "trusted-types 'none'"):
        assert directive in policy


# --- loopback -----------------------------------------------------------------------------------------------------


def reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def test_only_the_loopback_address_is_listened_on(served: Served) -> None:
    assert reaches("127.0.0.1", served.port) and not reaches("127.0.0.2", served.port)
    with listen("0.0.0.0", 0) as everywhere:  # the negative control: 127.0.0.2 stands for any other address of this machine
        assert reaches("127.0.0.2", everywhere.getsockname()[1])


def test_an_address_that_is_taken(served: Served) -> None:
    with pytest.raises(
        OSError, match=rf"cannot listen on 127\.0\.0\.1 port {served.port} \(Address already in use\): give ano"
    ):
        listen("127.0.0.1", served.port)


# --- limits ---------------------------------------------------------------------------------------------------------


def raw(served: Served, data: bytes, then: tuple[float, bytes] = (0, b""), times: int = 1) -> bytes:
    """Everything that comes back for some bytes, and `times` times more of them after a while each."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(data)
        try:
            for _ in range(times if then[1] else 0):
                time.sleep(then[0])
                connection.sendall(then[1])
        except OSError:
            pass  # the server has hung up
        received = b""
        while True:
            try:
                part = connection.recv(65536)
            except OSError:
                return received
            if not part:
                return received
            received += part


def head(served: Served, own: dict[str, str | None], *more: str, close: bool = True) -> bytes:
    lines = ["POST /api/next HTTP/1.1", f"Host: 127.0.0.1:{served.port}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in own.items()] + ["Connection: close"] * close + list(more)
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def test_bodies_are_limited_in_bytes(served: Served) -> None:
    own = let_in(served)
    most = json.dumps({"labeller": "Ann", "comment": "x" * (MAX_BODY_BYTES - 40)})
    assert len(most) <= MAX_BODY_BYTES and accepted(served, own, body=most)
    over = json.dumps({"labeller": "Ann", "comment": "x" * MAX_BODY_BYTES})
    status, _, body = ask(served, "POST", "/api/next", own, over)
    assert status == 413 and json.loads(body)["error"] == "the request has more than 1,048,576 bytes"
    # what is announced is refused before it comes
    for length in ("1048577", "9" * 18, "9" * 60):
        answered = raw(served, head(served, own, f"Content-Length: {length}"))
        assert answered.split()[1] in (b"413", b"400"), answered
    # and what is not announced is counted
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answered = raw(served, head(served, own, "Transfer-Encoding: chunked"), (0, piece), 40)
    assert answered.split()[1] == b"413"
    small = b"%x\r\n%s\r\n0\r\n\r\n" % (len(NEXT), NEXT.encode())
    assert raw(served, head(served, own, "Transfer-Encoding: chunked") + small).split()[1] == b"200"


def test_heads_are_limited_in_bytes(served: Served) -> None:
    own = let_in(served)
    assert ask(served, "GET", "/", {**own, "X-Much": "x" * 8000})[0] == 200
    answered = raw(served, b"GET / HTTP/1.1\r\nX-Much: " + b"x" * 40_000)
    assert answered.split()[1] in (b"400", b"431")


def test_time_is_limited(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    own = let_in(served)
    begin = time.monotonic()
    patient = raw(served, head(served, own, f"Content-Length: {len(NEXT)}"), (0.7, NEXT.encode()))
    assert patient.split()[1] == b"200" and time.monotonic() - begin >= 0.7  # the negative control: 10 seconds are allowed
    monkeypatch.setattr(web, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(web, "HEAD_SECONDS", 0.3)
    assert raw(served, head(served, own, f"Content-Length: {len(NEXT)}")).split()[1] == b"408"
    # a byte now and then does not help
    begin = time.monotonic()
    answered = raw(served, head(served, own, "Content-Length: 1000"), (0.1, b"{"), 50)
    assert answered.split()[1] == b"408" and time.monotonic() - begin < 4
    for data, then in ((b"", b""), (b"GET / HT", b""), (b"GET / HTTP/1.1\r\nX: ", b"x")):
        begin = time.monotonic()
        assert raw(served, data, (0.1, then), 50) == b"" and time.monotonic() - begin < 4
    assert ask(served, "GET", "/", own)[0] == 200


def test_connections_are_limited(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    own = let_in(served)
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(web.MAX_CONNECTIONS + 5)]
    try:
        deadline = time.monotonic() + 10
        while (status := ask(served, "GET", "/", own)[0]) == 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert status == 503
    finally:
        for connection in idle:
            connection.close()
    deadline = time.monotonic() + 10
    while ask(served, "GET", "/", own)[0] != 200:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff{}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"[" * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_json(served: Served, body: bytes) -> None:
    own = let_in(served)
    status, _, found = ask(served, "POST", "/api/next", own, body)
    assert status == 400 and json.loads(found)["error"].startswith("the request ")


def test_errors_are_sentences(served: Served) -> None:
    page = Page(served.address)
    item = page.next()["item"]
    for call, status, message in [
        (lambda: page.submit(item["id"], {"ranking": []}), 422, "ranking must name each of A, B, C, D once"),
        (lambda: page.post("next", labeller=""), 422, "labeller is empty"),
        (lambda: page.undo(), 409, "there is nothing to take back"),
        (lambda: page.submit(7, in_order(item)), 409, "item 7 was not given to Ann"),
    ]:
        with pytest.raises(Refused, match=message) as raised:
            call()
        assert raised.value.status == status
    page.submit(item["id"], in_order(item))
    with pytest.raises(Refused, match="answered this item already") as raised:
        page.submit(item["id"], in_order(item))
    assert raised.value.status == 409 and raised.value.body["next"]["item"]["number"] == 2
    page.close()
    status, _, found = ask(served, "POST", "/api/next", let_in(served, "another-token"), json.dumps({"labeller": "a\ud800"}))
    assert (status, json.loads(found)) == (422, {"error": "labeller is no valid Unicode at character 1"})


def test_a_full_disk_is_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.feedback.store import StoreError

    page = Page(served.address)
    item = page.next()["item"]
    with monkeypatch.context() as patched:

        def full(*_: Any, **__: Any) -> Any:
            raise StoreError("cannot use f.db: database or disk is full (free some space on this file system)")

        patched.setattr(served.store, "add", full)
        with pytest.raises(Refused, match=r"disk is full .*; nothing was kept of this, so send it again") as raised:
            page.submit(item["id"], in_order(item), "submission-1")
        assert raised.value.status == 507
    assert page.submit(item["id"], in_order(item), "submission-1")["item"]["number"] == 2
    page.close()


# --- the disk ---------------------------------------------------------------------------------------------------------

_opened: list[str] = []
_watching = threading.Event()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching.is_set():
        _opened.append(str(arguments[0]))


def test_no_path_of_a_request_reaches_the_disk(served: Served, tmp_path: Path) -> None:
    own = let_in(served)
    assert ask(served, "GET", "/", own)[0] == 200
    sys.addaudithook(_watch)  # for good, so it looks only while it is asked to
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    paths = [
        "/secret.txt",
        "/../../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page.css/../server.py",
    ]
    paths += [
        "/label.js%00",
        "//etc/passwd",
        "/page/label.html",
        f"/{secret}",
        "/api/../page.css",
        "/label.html",
        "/play.html",
        "/play.js",
        "/feedback.db",
    ]
    paths += ["/api/session?labeller=../../x", "/static/x", "/label.js/", "/.git/config", "/%c0%ae%c0%ae/", "/api/%2e%2e/x"]
    _watching.set()
    try:
        for path in paths:
            status, _, body = ask(served, "GET", path, own)
            assert status in (404, 307) or path.startswith("/api/session"), path
            assert b"secret" not in body and b"root:" not in body
        for path in ("/", "/page.css", "/label.js"):
            ask(served, "GET", path, own)
        assert _opened == []
        secret.read_text()  # the negative control: it would have been seen
        assert _opened == [str(secret)]
    finally:
        _watching.clear()


def test_the_page_is_served_as_it_lies_there(served: Served) -> None:
    own = let_in(served)
    folder = Path(web.__file__).parent / "page"
    for path, name, kind in (
        ("/", "label.html", "text/html; charset=utf-8"),
        ("/page.css", "page.css", "text/css; charset=utf-8"),
        ("/label.js", "label.js", "text/javascript; charset=utf-8"),
    ):
        status, headers, body = ask(served, "GET", path, own)
        if (folder / name).exists():
            assert (status, headers["content-type"], body) == (200, kind, (folder / name).read_bytes())
    for verb in ("session", "progress"):
        assert ask(served, "GET", f"/api/{verb}", own)[1]["content-type"] == "application/json"
