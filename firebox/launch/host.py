"""The worker's side of a launch: lease, socket, token check, ready notice, graceful end.

Owns everything around a worker's ASGI app and nothing inside it. Invariant: no request without the worker's token
reaches the app, and a process that cannot serve says why in one line and exits.
"""

from __future__ import annotations

import hmac
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Final

import msgspec
import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from firebox.launch.lease import ORPHAN_EXIT_CODE, watch_lease
from firebox.wire.errors import FireboxError, Unauthenticated, envelope
from firebox.wire.worker import WORKER_TOKEN_HEADER, ReadyNotice, WorkerRuntime

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KEEP_ALIVE_S: Final = 120
"""How long a server keeps an idle connection. Longer than any client here does: who closes first must be the one who
sends next, or a request meets a connection that is just being closed."""

_GRACE_S: Final = 3
_EXIT_WITHIN_S: Final = 5.0
_BACKLOG: Final = 1024


class TokenCheck:
    """ASGI middleware: every HTTP request must carry `token`, else 401. Lifespan messages pass."""

    def __init__(self, app: App, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._known(Headers(raw=scope["headers"])):
            await self._app(scope, receive, send)
            return
        error = Unauthenticated("this worker answers only requests that carry its token")
        await JSONResponse(envelope(error), status_code=error.status)(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        given = headers.get(WORKER_TOKEN_HEADER) or headers.get("x-api-key") or bearer
        return hmac.compare_digest(given.encode(), self._token)


class _Server(uvicorn.Server):
    """uvicorn that reports readiness once it listens, and ends for certain once asked to."""

    def __init__(self, app: App, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                lifespan="on",
                timeout_graceful_shutdown=_GRACE_S,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # An engine thread in native code cannot be interrupted: whatever still runs then is cut off.
        timer = threading.Timer(_EXIT_WITHIN_S, os._exit, [0])
        timer.daemon = True
        timer.start()
        await super().shutdown(sockets)


def serve(build: Callable[[], App], runtime: WorkerRuntime) -> None:
    """Serve `build()` on `runtime.socket` until SIGTERM, or until the server that holds the lease is gone.

    A failure to build is reported on `runtime.ready_fd` and ends the process with status 1.
    """
    if runtime.lease is not None:
        watch_lease(Path(runtime.lease), runtime.orphan_grace_s, lambda: os._exit(ORPHAN_EXIT_CODE))
    _serve_on(build, runtime.token, lambda: _unix_socket(runtime.socket), lambda notice: _notify(runtime, notice))


def serve_alone(build: Callable[[], App], token: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve `build()` on 127.0.0.1 with `token` as the API key; `ready` gets the base URL. Port 0 picks a free one."""
    listener = socket.create_server(("127.0.0.1", port))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    _serve_on(build, token, lambda: listener, lambda notice: ready(url) if notice.ready else None)


def _serve_on(
    build: Callable[[], App], token: str, listen: Callable[[], socket.socket], notify: Callable[[ReadyNotice], None]
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        app = TokenCheck(build(), token)
        listener = listen()
    except Exception as error:  # noqa: BLE001 - a process boundary; the launcher gets the reason, the log the trace
        traceback.print_exc()
        reason = error.message if isinstance(error, FireboxError) else f"{type(error).__name__}: {error}"
        notify(ReadyNotice(ready=False, error=reason))
        sys.exit(1)
    _Server(app, lambda: notify(ReadyNotice(ready=True))).run(sockets=[listener])


def _unix_socket(path: str) -> socket.socket:
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o077)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(_BACKLOG)
    return listener


def _notify(runtime: WorkerRuntime, notice: ReadyNotice) -> None:
    if runtime.ready_fd is not None:
        with os.fdopen(runtime.ready_fd, "wb") as pipe:
            pipe.write(msgspec.json.encode(notice) + b"\n")
