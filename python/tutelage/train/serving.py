"""Serving a page until Ctrl-C: what `tutelage label` and `tutelage play` have in common."""

from __future__ import annotations

import ipaddress
import secrets
import socket
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.feedback.server import Api

Say = Callable[..., None]


def web() -> Any:
    """The module of the server. Raises ImportError, saying what to install, without starlette and uvicorn."""
    try:
        from tutelage.feedback import server
    except ImportError as error:
        raise ImportError(f"the page needs starlette and uvicorn: pip install 'tutelage[label]' ({error})") from error
    return server


@contextmanager
def place(host: str, port: int, allowed_hosts: Sequence[str]) -> Iterator[Place]:
    """An address to serve at, for a `with`; listened on from its beginning, so that what is wrong with it is told before any
    other work.

    host, port, allowed_hosts: as the options are. Raises ImportError as `web`, OSError for an address that is taken, and
    ValueError for every address of the machine without names.
    """
    server, names = web(), _names(host, allowed_hosts)
    with server.listen(host, port) as listener:
        yield Place(server, listener, names)


class Place:
    """Somewhere to serve."""

    def __init__(self, server: Any, listener: socket.socket, names: Sequence[str]) -> None:
        self._web, self._listener = server, listener
        self._address, self._port = listener.getsockname()[:2]
        self._hosts = [f"{name}:{self._port}" for name in names]

    def serve(self, api: Api, addresses: int, browser: bool, say: Say, told: str, complete: Callable[[], bool]) -> None:
        """Serves until `complete()` is true after a change; Ctrl-C goes on as KeyboardInterrupt.

        addresses: one-time addresses to print, of which the first is opened in a browser if `browser`. told: said after them.
        """
        tokens = [secrets.token_urlsafe(32) for _ in range(addresses)]

        def after() -> None:
            server.should_exit = server.should_exit or complete()

        gate = self._web.Gate(tokens, f"tutelage-{self._port}")
        server = self._web.make_server(self._web.make_app(api, gate, self._hosts, after))
        printed = [f"http://{self._hosts[0]}/?token={token}" for token in tokens]
        for address in printed:  # each in one piece, whatever else is said meanwhile
            print(f"{address}\n", end="", flush=True)
        say(f"{told}. Each address works once. Ctrl-C ends; the same command goes on.")
        if not ipaddress.ip_address(self._address).is_loopback:
            say("This address can be reached over the network, unencrypted: use it only where you trust everybody.", "yellow")
        if browser:
            _open(printed[0])
        server.run(sockets=[self._listener])


def _open(address: str) -> None:
    """Opens the address in a browser with a window of its own; one that runs in the terminal would take it away."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if not isinstance(browser, webbrowser.GenericBrowser) or isinstance(browser, webbrowser.BackgroundBrowser):
        browser.open(address)


def _names(host: str, allowed_hosts: Sequence[str]) -> list[str]:
    """What a browser may call this server, the one to print first."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return [host, *allowed_hosts]
    own = f"[{address}]" if address.version == 6 else str(address)
    if address.is_loopback:
        return [own, "localhost", *allowed_hosts]
    if address.is_unspecified and not allowed_hosts:
        raise ValueError(f"{host} is every address of this machine: name those that browsers use with --allowed_hosts")
    return [*allowed_hosts, own]
