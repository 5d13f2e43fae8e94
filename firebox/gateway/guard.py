"""What every request must pass before anything else sees it: host name, origin, key, limits, size.

Knows keys only through the look-up it is given. Invariant: no route, documentation included, is reached without a
valid key or, for a download, a ticket.
"""

from __future__ import annotations

import base64
import contextlib
import re
import socket
from collections.abc import Callable, Iterable
from typing import Final

from starlette.datastructures import Headers

from firebox.gateway.limits import Key, Limits
from firebox.gateway.observe import App, Message, Receive, Scope, Send
from firebox.wire.errors import PermissionDenied, TooLarge, Unauthenticated
from firebox.wire.tinker import DOWNLOADS

MAX_BODY_BYTES: Final = 256 * 1024 * 1024
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_WILDCARDS: Final = frozenset({"0.0.0.0", "::", ""})
_AUTHORITY: Final = re.compile(r"(?:\[([0-9a-f:]+)\]|([\w.-]+))(?::\d+)?", re.ASCII | re.IGNORECASE)
_POLICY_VIOLATION: Final = 1008
_NOT_COUNTED: Final = ("/retrieve_future", "/session_heartbeat")
"""Waiting for what was asked before, and staying alive, is not asking."""


def allowed_hosts(bound: str, names: Iterable[str] = ()) -> frozenset[str]:
    """The Host names that a server bound to `bound`, and known as `names`, answers to; anything else may be a page that
    rebinds its DNS name."""
    own = {socket.gethostname(), socket.getfqdn()} if bound in _WILDCARDS else {bound}
    return _LOOPBACK | {name.lower() for name in (*own, *names)}


class Guard:
    """ASGI middleware. Sets `account`, `operator` and `key` (its name) in the scope of what lies behind it."""

    def __init__(
        self,
        app: App,
        key_of: Callable[[str], Key | None],
        hosts: frozenset[str],
        account_of_ticket: Callable[[str], str | None],
    ) -> None:
        self._app = app
        self._key_of = key_of
        self._hosts = hosts
        self._account_of_ticket = account_of_ticket
        self._limits = Limits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # nothing here is one
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        with contextlib.ExitStack() as held:
            if scope["type"] == "http":
                headers = Headers(raw=scope["headers"])
                self._check_names(headers)
                self._admit(scope, headers, held)
                receive = _limited(receive, headers)
            await self._app(scope, receive, send)

    def _check_names(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if _name(host) not in self._hosts:
            raise PermissionDenied(f"Host: {host!r} is not a name of this server", reason="HOST_NOT_ALLOWED")
        origin = headers.get("origin")
        if origin is not None and _name(origin.partition("://")[2]) not in self._hosts:
            raise PermissionDenied(f"Origin: pages of {origin!r} may not use this server", reason="ORIGIN_NOT_ALLOWED")

    def _admit(self, scope: Scope, headers: Headers, held: contextlib.ExitStack) -> None:
        key = self._key_of(headers.get("x-api-key") or _authorization(headers.get("authorization", "")))
        if key is not None:
            if not scope["path"].endswith(_NOT_COUNTED):
                held.enter_context(self._limits.slot(key))
            scope.update(account=key.account, operator=key.operator, key=key.name)
        elif account := self._by_ticket(scope):
            scope.update(account=account, operator=False, key="ticket")
        else:
            raise Unauthenticated(
                "X-Api-Key: the API key is missing or wrong; set FIREWORKS_API_KEY to the key that firebox up made",
                reason="INVALID_API_KEY",
            )

    def _by_ticket(self, scope: Scope) -> str | None:
        """The account of a download. Its tools send no headers: their key is in the URL, opens one artifact and soon
        expires."""
        if scope["method"] != "GET" or not scope["path"].startswith(DOWNLOADS):
            return None
        return self._account_of_ticket(scope["path"].removeprefix(DOWNLOADS).partition("/")[0])


def _authorization(header: str) -> str:
    """The key in a bearer token or, as browsers send it, in the place of a password."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return value
    try:
        return base64.b64decode(value).decode().partition(":")[2]
    except ValueError:
        return ""


def _name(authority: str) -> str:
    """The host in `host` or `host:port`, in lower case; empty for anything else."""
    match = _AUTHORITY.fullmatch(authority)
    return (match[1] or match[2]).lower() if match else ""


def _limited(receive: Receive, headers: Headers) -> Receive:
    """`receive` that refuses a body which is, or grows, beyond the limit, whatever its headers promise."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
        raise _too_large()
    if "content-length" in headers:
        return receive
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return counted


def _too_large() -> TooLarge:
    return TooLarge(f"body: at most {MAX_BODY_BYTES // 2**20} MiB are accepted; send fewer datums per request")
