"""The server of the pages: a starlette application that answers nobody else.

A page in the same browser, or a host name that somebody points at this machine, must not be able to judge in a person's name,
nor to read what is judged. So, for every request:

* The address that is listened on is the loopback's, unless another is asked for.
* Host must be one of the allow-list (DNS rebinding: a foreign name that leads here is refused).
* A one-time token, printed where the server was started, is exchanged for a cookie: HttpOnly, SameSite=Strict, random, kept in
  memory only. Without it nothing is served.
* A change needs POST, Content-Type application/json, an Origin that is the request's own Host, and a Sec-Fetch-Site of
  same-origin where the browser sends one. Other reads of the API are refused from another site too.
* The response's Content-Security-Policy lets the page load its own script and style sheet and nothing else, run no inline
  script, be framed by nobody, and (Trusted Types) turn no string into markup.
* Bodies are limited in bytes and time, heads in bytes and time, connections in number.
* The page's files are read once, at the start: no path of a request ever reaches the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tutelage.feedback.desk import Conflict, Desk
from tutelage.feedback.store import StoreError
from tutelage.feedback.table import Table
from tutelage.feedback.tasks import AnswerError

MAX_BODY_BYTES = 1 << 20
"""Of a request; an answer to one item has at most 200,000 characters."""
MAX_HEAD_BYTES = 16 << 10
BODY_SECONDS = 10.0
"""In which a body must have arrived."""
HEAD_SECONDS = 10.0
"""In which the head of a request must have arrived, from the connection's beginning or the end of the answer before."""
MAX_CONNECTIONS = 200

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class Stream(Protocol):
    """An answer that comes in pieces."""

    def step(self) -> list[Mapping[str, Any]] | None:
        """What there is to tell now; None when all was told."""
        ...

    def close(self) -> None:
        """Called once, at the end, or when nobody listens any more."""
        ...


@dataclass(frozen=True)
class Api:
    """What a page may ask for, by path: functions of JSON to JSON, which run in threads."""

    command: str
    """That has printed the address."""
    files: tuple[str, ...]
    """Of the page: first the one that is served at /, then those that it loads."""
    reads: Mapping[str, Callable[[object], Any]]
    """Of the query's `labeller`."""
    changes: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    streams: Mapping[str, Callable[[Mapping[str, Any]], Stream]] = field(default_factory=dict)
    """Answered by lines of JSON, as they come."""


def label_api(desk: Desk) -> Api:
    """The labelling page's."""
    return Api(
        "label",
        ("label.html", "page.css", "label.js", "shared.js", "icon.svg"),
        {"session": desk.session, "progress": desk.progress},
        {"next": desk.next, "submit": desk.submit, "skip": desk.skip, "undo": desk.undo},
    )


def play_api(table: Table) -> Api:
    """The page to talk at."""
    return Api(
        "play",
        ("play.html", "page.css", "play.js", "shared.js", "icon.svg"),
        {"session": table.session},
        {"judge": table.judge, "undo": table.undo},
        {"say": table.say},
    )


class Gate:
    """Who may come in: one-time tokens, and the cookies that were given for them. In memory only."""

    def __init__(self, tokens: Collection[str], cookie_name: str) -> None:
        self._tokens = {_digest(token) for token in tokens}
        self._cookies: set[bytes] = set()
        self.cookie_name = cookie_name

    def exchange(self, token: str) -> str | None:
        """The cookie's value for a token that was not used yet; None for any other."""
        digest = _digest(token)
        if digest not in self._tokens:
            return None
        self._tokens.remove(digest)
        cookie = secrets.token_urlsafe(32)
        self._cookies.add(_digest(cookie))
        return cookie

    def knows(self, cookies: Mapping[str, str]) -> bool:
        """Whether a request has a cookie that was given out."""
        return _digest(cookies.get(self.cookie_name, "")) in self._cookies


def _digest(secret: str) -> bytes:
    # Digests are looked up, not secrets: how long that takes says nothing about a secret.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


class _Refusal(Exception):  # noqa: N818 (an answer, not a failure)
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def make_app(api: Api, gate: Gate, hosts: Collection[str], after: Callable[[], None] = lambda: None) -> ASGIApp:
    """The application.

    hosts: what the header Host may be, with the port, as in "127.0.0.1:8000". after: called after every change.
    """
    folder = resources.files("tutelage.feedback") / "page"
    pages = {f"/{name}": (folder / name).read_bytes() for name in api.files}
    home = f"/{api.files[0]}"

    def known(request: Request) -> None:
        if not gate.knows(request.cookies):
            raise _Refusal(403, f"open the address that `tutelage {api.command}` has printed; it lets this browser in")

    async def page(request: Request) -> Response:
        path = request.url.path
        token = request.query_params.get("token")
        if path == "/" and token is not None and not gate.knows(request.cookies):
            cookie = gate.exchange(token)
            if cookie is None:
                raise _Refusal(
                    403, f"this address was used before; `tutelage {api.command}` prints a new one when it is started again"
                )
            response = RedirectResponse("/", 303)
            response.set_cookie(gate.cookie_name, cookie, httponly=True, samesite="strict", path="/")
            return response
        known(request)
        if token is not None:
            return RedirectResponse("/", 303)
        found = home if path == "/" else path
        return Response(pages[found], media_type=_TYPES[found.rpartition(".")[2]])

    def reading(answer: Callable[[object], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            known(request)
            _same_site(request)
            return JSONResponse(await run_in_threadpool(answer, request.query_params.get("labeller")))

        return endpoint

    async def allowed_body(request: Request) -> Mapping[str, Any]:
        known(request)
        _same_site(request)
        _same_origin(request)
        return await _body(request)

    def changing(answer: Callable[[Mapping[str, Any]], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            found = await run_in_threadpool(answer, await allowed_body(request))
            after()
            return JSONResponse(found)

        return endpoint

    def streaming(answer: Callable[[Mapping[str, Any]], Stream]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            stream = await run_in_threadpool(answer, await allowed_body(request))
            return StreamingResponse(_lines(request, stream), media_type="application/x-ndjson")

        return endpoint

    app = Starlette(
        routes=[
            Route("/", page, methods=["GET"]),
            *(Route(path, page, methods=["GET"]) for path in pages if path != home),
            *(Route(f"/api/{name}", reading(answer), methods=["GET"]) for name, answer in api.reads.items()),
            *(Route(f"/api/{name}", changing(answer), methods=["POST"]) for name, answer in api.changes.items()),
            *(Route(f"/api/{name}", streaming(answer), methods=["POST"]) for name, answer in api.streams.items()),
        ],
        exception_handlers={
            _Refusal: _refused,
            AnswerError: _wrong,
            Conflict: _late,
            StoreError: _not_stored,
            404: _no_page,
            405: _no_page,
        },
    )
    return _Guard(app, frozenset(host.lower() for host in hosts))


async def _lines(request: Request, stream: Stream) -> AsyncIterator[bytes]:
    """What a stream tells, until all is told or nobody listens; what goes wrong is the last line."""
    try:
        while not await request.is_disconnected():
            try:
                told = await run_in_threadpool(stream.step)
            except StoreError as error:
                told = [{"error": f"{error}; nothing was kept of this, so say it again"}]
            except Exception as error:  # told to the person who waits, whatever it is
                told = [{"error": str(error) or type(error).__name__}]
            if told is None:
                return
            yield b"".join(json.dumps(line).encode() + b"\n" for line in told)
            if any("error" in line for line in told):
                return
    finally:
        stream.close()


def _same_site(request: Request) -> None:
    site = request.headers.get("sec-fetch-site", "same-origin")
    if site != "same-origin":
        raise _Refusal(403, "this request came from another page")


def _same_origin(request: Request) -> None:
    origin = request.headers.get("origin")
    if origin is None or origin.lower() != f"http://{request.headers['host']}".lower():
        raise _Refusal(403, "this request came from another page")


async def _body(request: Request) -> Mapping[str, Any]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise _Refusal(415, "the request must be application/json")
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or int(length[:20]) > MAX_BODY_BYTES:
        raise _Refusal(413, f"the request has more than {MAX_BODY_BYTES:,} bytes")
    try:
        data = await asyncio.wait_for(_received(request), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise _Refusal(408, f"the request took more than {BODY_SECONDS:.0f} seconds to arrive") from None
    try:
        body = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _Refusal(400, "the request is not valid JSON") from None
    if not isinstance(body, dict):
        raise _Refusal(400, "the request must be a JSON object")
    return body


async def _received(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise _Refusal(413, f"the request has more than {MAX_BODY_BYTES:,} bytes")
    return bytes(data)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _error(status: int, error: object, **more: Any) -> Response:
    return JSONResponse({"error": str(error), **more}, status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, _Refusal)
    if request.url.path.startswith("/api/"):
        return _error(error.status, error)
    return PlainTextResponse(str(error) + "\n", error.status)


async def _wrong(request: Request, error: Exception) -> Response:
    return _error(422, error)


async def _late(request: Request, error: Exception) -> Response:
    assert isinstance(error, Conflict)
    return _error(409, error, **error.instead)


async def _not_stored(request: Request, error: Exception) -> Response:
    return _error(507, f"{error}; nothing was kept of this, so send it again")


async def _no_page(request: Request, error: Exception) -> Response:
    return _error(getattr(error, "status_code", 404), "there is no such page")


class _Guard:
    """Host allow-list and headers around everything, also around what starlette itself answers."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or hosts[0].decode("latin-1").lower() not in self._hosts:
            refusal = PlainTextResponse("this server does not answer to that name\n", 421)
            await refusal(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)


class _Protocol(H11Protocol):
    """uvicorn's, with a time in which a request's head must have arrived."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The time runs while no request is being answered; also while the body of one that was refused still comes."""
        waiting = self.cycle is None or self.cycle.response_complete
        if self._late is not None and not waiting:
            self._late.cancel()
            self._late = None
        elif self._late is None and waiting:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: any that is free. Raises OSError naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, which asyncio must know to send a short answer at once instead of 40 ms later (Nagle's algorithm).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port} ({error.strerror}): give another --port") from error
    return listener


def make_server(app: ASGIApp) -> uvicorn.Server:
    """The web server; `run(sockets=[listen(…)])` serves until it is told to stop."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    return uvicorn.Server(config)
