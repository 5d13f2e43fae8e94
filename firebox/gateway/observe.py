"""What is known of every request: its id, its outcome, its time, in the log and in the counters of `/metrics`.

Owns the outermost boundary. Knows nothing of who may ask for what. Invariant: every answer carries a request id, every
line that is logged on the way carries the same one, and no failure leaves without the error envelope.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any, Final

from prometheus_client import Counter, Gauge, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from firebox.wire.errors import FireboxError, Internal, Unauthenticated, envelope, headers
from firebox.wire.tinker import DOWNLOADS

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID: Final = "x-request-id"
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that is being served."""

_SAFE_ID: Final = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_CLIENT_LEFT: Final = 499
_SECONDS: Final = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)

_ANSWERED: Final = Counter("firebox_requests", "Requests answered.", ["method", "route", "status"])
_TOOK: Final = Histogram("firebox_request_seconds", "From the first byte to the last.", ["route"], buckets=_SECONDS)
_OPEN: Final = Gauge("firebox_requests_open", "Requests that are being served.")

log = logging.getLogger(__name__)


class Observed:
    """ASGI middleware around everything else."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(raw=scope["headers"]).get(REQUEST_ID, "")
        ident = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(ident)
        answer, begun = _Answer(send, ident), time.monotonic()
        try:
            with _OPEN.track_inprogress():
                await self._served(scope, receive, answer)
        finally:
            _note(scope, answer.status, time.monotonic() - begun)
            request_id.reset(token)

    async def _served(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self._app(scope, receive, answer)
        except ClientDisconnect:
            answer.status = _CLIENT_LEFT
        except FireboxError as error:
            await answer.fail(error, scope, receive)
        except Exception as error:  # noqa: BLE001 - the last boundary: a bug must become an answer with an id
            await answer.fail(_bug(scope, error), scope, receive)


class _Answer:
    """`send`, with the request id on every answer, and a failure turned into an envelope while that is possible."""

    def __init__(self, send: Send, ident: str) -> None:
        self._send = send
        self._ident = ident
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID] = self._ident
        await self._send(message)

    async def fail(self, error: FireboxError, scope: Scope, receive: Receive) -> None:
        if self.status:
            raise error  # half an answer is out: only closing the connection tells the client
        told = headers(error)
        if isinstance(error, Unauthenticated) and "text/html" in Headers(raw=scope["headers"]).get("accept", ""):
            told["www-authenticate"] = 'Basic realm="Firebox: the API key is the password"'
        await JSONResponse(envelope(error), error.status, told)(scope, receive, self)


def _bug(scope: Scope, error: Exception) -> Internal:
    log.error("%s %s failed", scope["method"], _shown(scope), exc_info=error)
    return Internal("the server failed on this request; its log has the cause under the request's id")


def _note(scope: Scope, status: int, seconds: float) -> None:
    method = scope["method"] if scope["method"] in _METHODS else "other"
    route = getattr(scope.get("route"), "path", "") or "none"
    _ANSWERED.labels(method, route, status).inc()
    _TOOK.labels(route).observe(seconds)
    fields = {"status": status, "seconds": round(seconds, 4), "key": scope.get("key")}
    log.info("%s %s", scope["method"], _shown(scope), extra={"fields": fields})


def _shown(scope: Scope) -> str:
    """The path as it was sent, so that no line break can be smuggled in; a ticket in it is a secret."""
    path: str = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
    return f"{DOWNLOADS}..." if path.startswith(DOWNLOADS) else path
