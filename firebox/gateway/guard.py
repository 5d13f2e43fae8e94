"""What every request must pass before anything else sees it: host name, key, size; and what every answer carries.

Knows keys only through the look-up it is given. Invariant: no route, documentation included, is reached without a
valid key or, for a download, a ticket, and no failure leaves without the error envelope and a request id.
"""

from __future__ import annotations

import logging
import re
import socket
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from firebox.wire.errors import FireboxError, Internal, InvalidArgument, PermissionDenied, Unauthenticated, envelope
from firebox.wire.tinker import DOWNLOADS

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES: Final = 256 * 1024 * 1024
REQUEST_ID: Final = "x-request-id"
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_WILDCARDS: Final = frozenset({"0.0.0.0", "::", ""})
_SAFE_ID: Final = re.compile(r"[\w.:/-]{1,128}")

log = logging.getLogger(__name__)


def allowed_hosts(bound: str) -> frozenset[str]:
    """The Host names a server bound to `bound` answers to; anything else may be a page that rebinds its DNS name."""
    own = {socket.gethostname(), socket.getfqdn()} if bound in _WILDCARDS else {bound}
    return _LOOPBACK | {name.lower() for name in own}


class Guard:
    """Outermost ASGI middleware. Sets `scope["account"]` for what lies behind it."""

    def __init__(
        self,
        app: App,
        account_of: Callable[[str], str | None],
        hosts: frozenset[str],
        account_of_ticket: Callable[[str], str | None],
    ) -> None:
        self._app = app
        self._account_of = account_of
        self._hosts = hosts
        self._account_of_ticket = account_of_ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(raw=scope["headers"])
        given = headers.get(REQUEST_ID, "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        answer = _Answer(send, request_id)
        try:
            scope["account"] = self._admit(scope, headers)
            await self._app(scope, _limited(receive, headers), answer)
        except ClientDisconnect:
            log.info("%s %s: the client left, request %s", scope["method"], scope["path"], request_id)
        except FireboxError as error:
            await answer.fail(error, scope, receive)
        except Exception as error:  # noqa: BLE001 - the last boundary: a bug must become an answer with an id
            await answer.fail(_bug(scope, request_id, error), scope, receive)

    def _admit(self, scope: Scope, headers: Headers) -> str:
        host = headers.get("host", "").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name.strip("[]") not in self._hosts:
            raise PermissionDenied(f"Host: {host!r} is not a name of this server", reason="HOST_NOT_ALLOWED")
        key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        account = self._account_of(key)
        if account is None and scope["method"] == "GET" and scope["path"].startswith(DOWNLOADS):
            # Download tools send no headers: their key is in the URL, opens one artifact and soon expires.
            account = self._account_of_ticket(scope["path"].removeprefix(DOWNLOADS).partition("/")[0])
        if account is None:
            raise Unauthenticated(
                "X-Api-Key: the API key is missing or wrong; set FIREWORKS_API_KEY to the key that firebox up made",
                reason="INVALID_API_KEY",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            raise _too_large()
        return account


class _Answer:
    """`send`, with the request id on every answer, and a failure turned into an envelope while that is possible."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self._started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            MutableHeaders(scope=message)[REQUEST_ID] = self._request_id
        await self._send(message)

    async def fail(self, error: FireboxError, scope: Scope, receive: Receive) -> None:
        if self._started:
            raise error  # half an answer is out: only closing the connection tells the client
        await JSONResponse(envelope(error), status_code=error.status)(scope, receive, self)


def _limited(receive: Receive, headers: Headers) -> Receive:
    """`receive` that refuses a body which grows beyond the limit, whatever its headers promise."""
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


def _too_large() -> InvalidArgument:
    return InvalidArgument(f"body: at most {MAX_BODY_BYTES // 2**20} MiB are accepted", reason="BODY_TOO_LARGE")


def _bug(scope: Scope, request_id: str, error: Exception) -> Internal:
    log.error("%s %s: request %s failed", scope["method"], scope["path"], request_id, exc_info=error)
    return Internal(f"the server failed on this request; its log has the cause under {request_id}")
