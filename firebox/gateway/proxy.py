"""From a request to the worker that serves it, streaming both ways.

Owns the connections to workers; asks look-up functions where a job or a deployment lives and reads nothing of a body
but the model of a completion and how its prompt begins. Invariant: a body is passed on as it came, and a worker that
is gone becomes an error the client can act on.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import httpx
import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from firebox.gateway.balance import Balance
from firebox.gateway.observe import REQUEST_ID
from firebox.wire.errors import FireboxError, InvalidArgument, NotFound, PermissionDenied, Unavailable
from firebox.wire.worker import WORKER_TOKEN_HEADER, WorkerAddress

LookUp = Callable[[str, str], Awaitable[WorkerAddress]]

_CONNECT_S: Final = 5.0
_READ_S: Final = 3600.0  # longer than any wait a worker imposes on itself; long polls alone take 30 s
_MAX_WORKERS: Final = 64
_PREFIX_BYTES: Final = 256
"""How much of a prompt, as JSON, two requests must share to be sent to the same replica."""
_HOP_BY_HOP: Final = {"connection", "keep-alive", "proxy-authenticate", "te", "trailer", "transfer-encoding", "upgrade"}
_NOT_UPSTREAM: Final = _HOP_BY_HOP | {"host", "x-api-key", "authorization", WORKER_TOKEN_HEADER}
_NOT_DOWNSTREAM: Final = _HOP_BY_HOP | {REQUEST_ID, "server", "date"}


class _Addressed(msgspec.Struct):
    """What the gateway reads of a completion request; the prompt stays the JSON that it is."""

    model: str
    prompt: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")

    @property
    def prefix(self) -> bytes:
        return bytes(memoryview(self.prompt or self.messages)[:_PREFIX_BYTES])


@dataclass(frozen=True)
class LookUps:
    """Where a resource is served: (account, job id) to an address, (account, deployment name) to those of its replicas,
    at least one; or an error."""

    trainer: LookUp
    sampler: Callable[[str, str], Awaitable[Sequence[WorkerAddress]]]


class Proxy:
    """The data-plane endpoints. `close` ends the connections to every worker."""

    def __init__(self, look_ups: LookUps) -> None:
        self._look_ups = look_ups
        self._balance = Balance()
        self._clients: dict[WorkerAddress, httpx.AsyncClient] = {}

    async def trainer(self, request: Request) -> Response:
        account, job = request.path_params["account"], request.path_params["job"]
        path = "/" + request.path_params["path"]
        if account != request.scope["account"]:
            raise PermissionDenied(
                f"account: {account!r} is not yours; this key belongs to {request.scope['account']!r}"
            )
        if path.startswith("/worker/"):
            raise NotFound(f"{path} is not part of the training API")
        try:
            address = await self._look_ups.trainer(account, job)
            return await self._forward(request, address, path, request.stream())
        except NotFound:
            raise
        except FireboxError as error:
            return _without_worker(path, error)

    async def sampler(self, request: Request) -> Response:
        body = await request.body()
        try:
            addressed = msgspec.json.decode(body, type=_Addressed)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"model: the body must be a JSON object with a model name ({error})") from error
        replicas = await self._look_ups.sampler(request.scope["account"], addressed.model)
        path = request.url.path.removeprefix("/inference")
        *others, last = self._balance.order(replicas, addressed.prefix)
        for replica in others:
            with contextlib.suppress(Unavailable):  # nothing was answered, so another one may be asked
                return await self._sampled(request, replica, path, body)
        return await self._sampled(request, last, path, body)

    async def send(
        self, request: Request, address: WorkerAddress, path: str, content: bytes | AsyncIterator[bytes]
    ) -> httpx.Response:
        """The answer to `request` from the worker at `address`, sent to `path` with `content` as its body, unread.

        Raises Unavailable when the worker is gone.
        """
        # A body that is not the client's own has another length.
        dropped = _NOT_UPSTREAM | ({"content-length"} if isinstance(content, bytes) else set())
        headers = [(k, v) for k, v in request.headers.items() if k not in dropped]
        client = await self._client(address)
        outgoing = client.build_request(
            request.method,
            httpx.URL(path=path, query=request.url.query.encode()),
            headers=[*headers, (WORKER_TOKEN_HEADER, address.token)],
            content=content if request.method not in ("GET", "HEAD") else None,
        )
        try:
            return await client.send(outgoing, stream=True)
        except httpx.TransportError as error:
            raise Unavailable(f"the worker did not answer ({type(error).__name__}); it may have ended") from error

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()

    async def _forward(
        self, request: Request, address: WorkerAddress, path: str, content: bytes | AsyncIterator[bytes]
    ) -> Response:
        return relayed(await self.send(request, address, path, content))

    async def _sampled(self, request: Request, replica: WorkerAddress, path: str, body: bytes) -> Response:
        """The replica's answer, which keeps it busy until the last byte is out or the client has left."""
        with contextlib.ExitStack() as busy:
            busy.enter_context(self._balance.busy(replica))
            return relayed(await self.send(request, replica, path, body), over=busy.pop_all().close)

    async def _client(self, address: WorkerAddress) -> httpx.AsyncClient:
        client = self._clients.get(address)
        if client is None:
            if len(self._clients) >= _MAX_WORKERS:  # workers come and go: drop the one that was first used longest ago
                await self._clients.pop(next(iter(self._clients))).aclose()
            client = self._clients[address] = httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(
                    uds=address.socket,
                    verify=False,
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
                ),
                base_url="http://worker",
                timeout=httpx.Timeout(_READ_S, connect=_CONNECT_S),
            )
        return client


def relayed(answer: httpx.Response, content: bytes | None = None, over: Callable[[], None] = lambda: None) -> Response:
    """A worker's answer as ours: streamed, with a call of `over` at its end, or with `content` where that was read."""
    headers = {k: v for k, v in answer.headers.items() if k not in _NOT_DOWNSTREAM}
    if content is None:
        return _Relayed(answer, headers, over)
    return Response(content, status_code=answer.status_code, headers=headers)


class _Relayed(StreamingResponse):
    """Closes the worker's answer also when the client leaves before the first byte."""

    def __init__(self, answer: httpx.Response, headers: dict[str, str], over: Callable[[], None]) -> None:
        super().__init__(answer.aiter_raw(), status_code=answer.status_code, headers=headers)
        self._answer = answer
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()
            await self._answer.aclose()


def _without_worker(path: str, error: FireboxError) -> Response:
    """The answer for a job whose trainer is not there; raises `error` where the client can live with it."""
    if path.endswith("/retrieve_future"):
        # Clients ask again at once, and for ever, after an error here: a failed future ends the wait.
        return JSONResponse({"error": error.message, "category": error.category})
    if path.endswith("/telemetry"):
        # A client that outlives its job would spend 30 s of its close on retries; no trainer keeps these events.
        return JSONResponse({"status": "accepted"})
    raise error
