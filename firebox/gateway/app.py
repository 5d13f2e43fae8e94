"""The whole server as one ASGI app: the guard, the data plane, and the control plane behind them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from firebox.gateway.guard import Guard
from firebox.gateway.limits import Key
from firebox.gateway.observe import Observed
from firebox.gateway.proxy import LookUps, Proxy
from firebox.gateway.tinker import Root, RootCalls
from firebox.wire.errors import FireboxError, envelope

_ANY = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def build_app(
    control: Any,
    look_ups: LookUps,
    root_calls: RootCalls,
    key_of: Callable[[str], Key | None],
    account_of_ticket: Callable[[str], str | None],
    hosts: frozenset[str],
    lifespan: Callable[[], contextlib.AbstractAsyncContextManager[None]],
) -> Starlette:
    """`control` is the ASGI app of everything that is not the data plane; `lifespan` surrounds the server's life."""
    proxy = Proxy(look_ups)
    root = Root(root_calls, proxy)

    @contextlib.asynccontextmanager
    async def life(_app: Starlette) -> AsyncIterator[None]:
        async with lifespan():
            yield
            await root.close()
            await proxy.close()

    return Starlette(
        routes=[
            Route("/training/v1/rlorTrainerJobs/{account}/{job}/{path:path}", proxy.trainer, methods=_ANY),
            Route("/inference/v1/completions", proxy.sampler, methods=["POST"]),
            Route("/inference/v1/chat/completions", proxy.sampler, methods=["POST"]),
            Route("/v1/completions", proxy.sampler, methods=["POST"]),
            Route("/v1/chat/completions", proxy.sampler, methods=["POST"]),
            *root.routes,
            Mount("/", app=control),
        ],
        middleware=[Middleware(Observed), Middleware(Guard, key_of, hosts, account_of_ticket)],
        exception_handlers={FireboxError: _on_error},
        lifespan=life,
    )


async def _on_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FireboxError)
    return JSONResponse(envelope(error), status_code=error.status)
