"""The root API, `/api/v1/*`, as far as workers answer it: training operations, samples, and the wait for both.

There is no job in these URLs: a training operation goes where its `model_id` lives, a sample where its sampler does,
and `<worker>.<n>` as a request id leads back to who holds the answer. Where anything lives, and what a path means, it
asks the functions it is given; of a training body it reads nothing but the id of the model.

Invariant: whatever names its model is answered with a request id and takes its place in the model's sequence, also when
it is refused; the reason is told by the future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from firebox.gateway.futures import Futures, failure
from firebox.gateway.guard import MAX_BODY_BYTES
from firebox.gateway.proxy import LookUp, Proxy, relayed
from firebox.wire import sample_result, tinker
from firebox.wire.client_config import DYNAMIC_CONFIG, client_config
from firebox.wire.compression import decompress
from firebox.wire.errors import FireboxError, Internal, InvalidArgument, Unavailable
from firebox.wire.tinker import CheckpointPath, CheckpointType, CreateModelBody, LoadNewModelBody, SaveBody
from firebox.wire.training_proto import MEDIA_TYPE, model_id_of
from firebox.wire.worker import SnapshotRef, WorkerAddress

_OWN: Final = "_"
"""The worker part of the ids of requests that the server answers itself; no job can be called so."""
_HOLD_S: Final = 25.0
_SMALL: Final = 4096
_REMEMBERED: Final = 4096

_B = TypeVar("_B", bound=BaseModel)
_S = TypeVar("_S", bound=msgspec.Struct)


class Home(Protocol):
    """Where a training run lives: the id of its trainer job, and the process."""

    @property
    def job(self) -> str: ...
    @property
    def address(self) -> WorkerAddress: ...


class Sampling(Protocol):
    @property
    def address(self) -> WorkerAddress: ...
    @property
    def snapshot(self) -> SnapshotRef | None: ...


@dataclass(frozen=True)
class RootCalls:
    """What the control plane does for this API; the first argument is always the account."""

    trainer: LookUp
    home: Callable[[str, str], Awaitable[Home]]
    create: Callable[[str, CreateModelBody], Awaitable[dict[str, Any]]]
    create_from: Callable[[str, LoadNewModelBody], Awaitable[dict[str, Any]]]
    unload: Callable[[str, str], Awaitable[None]]
    state_ref: Callable[[str, str], Awaitable[str]]
    announce: Callable[[str, CheckpointPath, SaveBody], Awaitable[None]]
    sampler_of_run: Callable[[str, str, CheckpointPath], Awaitable[object]]
    sampling: Callable[[str, str], Awaitable[Sampling]]


class _Addressed(msgspec.Struct):
    model_id: str | None = None
    seq_id: int | None = None


class _FutureBody(msgspec.Struct):
    request_id: str


class _ConfigBody(msgspec.Struct):
    sdk_version: str = ""


class _Result(msgspec.Struct):
    """What of a small result may have to be told in the client's words."""

    type: str = ""
    path: str | None = None


class _Message(msgspec.Struct):
    message: str


class _Envelope(msgspec.Struct):
    error: _Message


class Root:
    def __init__(self, calls: RootCalls, proxy: Proxy) -> None:
        self._calls = calls
        self._proxy = proxy
        self._futures = Futures()
        self._sampler_numbers: dict[tuple[str, int | None], int] = {}

    @property
    def routes(self) -> list[Route]:
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "client/config": _config,
            "client/dynamic_config": _constant(DYNAMIC_CONFIG),
            "telemetry": _constant({"status": "accepted"}),
            "create_model": self._create_model,
            "unload_model": self._unload_model,
            "forward": self._operation,
            "forward_backward": self._operation,
            "optim_step": self._operation,
            "load_weights": self._load,
            "save_weights": self._save,
            "save_weights_for_sampler": self._save_for_sampler,
            "save_weights_external": self._save_external,
            "asample": self._sample,
            "retrieve_future": self._retrieve,
        }
        healthz = Route("/api/v1/healthz", _constant({"status": "ok"}), methods=["GET"])
        return [healthz, *(Route(f"/api/v1/{path}", handle, methods=["POST"]) for path, handle in posts.items())]

    async def close(self) -> None:
        await self._futures.close()

    # ------------------------------------------------------------------------------------------------------ models

    async def _create_model(self, request: Request) -> Response:
        body = _read(await request.body(), CreateModelBody)
        account = request.scope["account"]
        return self._own(account, f"create.{body.model_id}", lambda: _json(self._calls.create(account, body)))

    async def _load(self, request: Request) -> Response:
        raw = await request.body()
        address = _decode(raw, _Addressed)
        if address.model_id is None:
            body = _read(raw, LoadNewModelBody)
            account = request.scope["account"]
            return self._own(account, f"create.{body.model_id}", lambda: _json(self._calls.create_from(account, body)))

        async def translate() -> dict[str, Any]:
            fields = msgspec.json.decode(raw, type=dict[str, Any])
            return fields | {"path": await self._calls.state_ref(request.scope["account"], str(fields.get("path")))}

        return await self._rewritten(request, request.url.path, address, translate)

    async def _unload_model(self, request: Request) -> Response:
        model_id = _read(await request.body(), tinker.ModelAddress).model_id
        account = request.scope["account"]

        async def unload() -> dict[str, Any]:
            await self._calls.unload(account, model_id)
            return {"model_id": model_id, "type": "unload_model"}

        return self._own(account, f"unload.{model_id}", lambda: _json(unload()))

    # -------------------------------------------------------------------------------------------------- operations

    async def _operation(self, request: Request) -> Response:
        raw = await request.body()
        as_proto = request.headers.get("content-type", "").startswith(MEDIA_TYPE)
        # A body may be megabytes, and its id may stand at its end: other requests go on meanwhile.
        model_id = await asyncio.to_thread(_model_of, raw, request.headers.get("content-encoding"), as_proto)
        if not model_id:
            raise InvalidArgument("model_id: the body must name its model")
        try:
            home = await self._calls.home(request.scope["account"], model_id)
            return await self._accepted(request, home, request.url.path, raw)
        except FireboxError as error:
            return self._failed(request, error)

    async def _save(self, request: Request) -> Response:
        return await self._save_as(request, "training")

    async def _save_for_sampler(self, request: Request) -> Response:
        return await self._save_as(request, "sampler")

    async def _save_external(self, request: Request) -> Response:
        return await self._save_as(request, "external")

    async def _save_as(self, request: Request, kind: CheckpointType) -> Response:
        raw = await request.body()
        account = request.scope["account"]

        async def translate() -> dict[str, Any]:
            body = _read(raw, SaveBody)
            if body.age_encryption_recipients:
                raise InvalidArgument("age_encryption_recipients: files are not encrypted here; leave it out")
            if body.path is not None:
                path = tinker.checkpoint_path(body.model_id, kind, body.path)
                await self._calls.announce(account, path, body)
            elif kind == "sampler" and body.sampling_session_seq_id is not None:
                number = self._sampler_number(body.model_id, body.seq_id, body.sampling_session_seq_id)
                path = tinker.sampling_session_checkpoint(body.model_id, number)
                sampler = tinker.sampler_id(tinker.session_of(path.run), number)
                await self._calls.sampler_of_run(account, sampler, path)
            else:
                raise InvalidArgument("path: a name for the checkpoint is needed, for example 'step-10'")
            # How long it is kept, and for which sampler, is this side's business.
            ours = {"path": path.artifact, "ttl_seconds": None, "sampling_session_seq_id": None}
            return msgspec.json.decode(raw, type=dict[str, Any]) | ours

        route = "/api/v1/save_weights" if kind == "training" else "/api/v1/save_weights_for_sampler"
        return await self._rewritten(request, route, _decode(raw, _Addressed), translate)

    def _sampler_number(self, model_id: str, seq_id: int | None, number: int) -> int:
        """Which sampler a save without a name is for. Sent again, the SDK counts on, but it is the same operation."""
        first = self._sampler_numbers.setdefault((model_id, seq_id), number)
        if len(self._sampler_numbers) > _REMEMBERED:
            del self._sampler_numbers[next(iter(self._sampler_numbers))]
        return first

    async def _rewritten(
        self, request: Request, path: str, address: _Addressed, translate: Callable[[], Awaitable[dict[str, Any]]]
    ) -> Response:
        """Send to `path` what `translate` makes of the body; what it refuses keeps its place in the sequence."""
        if not address.model_id:
            raise InvalidArgument("model_id: the body must name its model")
        try:
            home = await self._calls.home(request.scope["account"], address.model_id)
            try:
                fields = await translate()
            except FireboxError as error:
                path = "/worker/runs/refuse"
                fields = {"model_id": address.model_id, "seq_id": address.seq_id, "error": error.message}
            return await self._accepted(request, home, path, msgspec.json.encode(fields))
        except FireboxError as error:
            return self._failed(request, error)

    async def _accepted(self, request: Request, home: Home, path: str, body: bytes) -> Response:
        answer = await self._proxy.send(request, home.address, path, body)
        content = await answer.aread()
        if answer.status_code != 200:
            return relayed(answer, content)
        request_id = msgspec.json.decode(content, type=_FutureBody).request_id
        return JSONResponse({"request_id": f"{home.job}.{request_id}", "model_id": None})

    # ---------------------------------------------------------------------------------------------------- sampling

    async def _sample(self, request: Request) -> Response:
        raw = await request.body()
        body = _read(raw, tinker.SampleAddress)
        account, sampler = request.scope["account"], body.sampling_session_id

        async def sample() -> bytes:
            target = await self._calls.sampling(account, sampler)
            order = msgspec.json.encode({"snapshot": target.snapshot, "request": msgspec.Raw(raw)})
            answer = await self._proxy.send(request, target.address, "/worker/sample", order)
            content = await answer.aread()
            if answer.status_code != 200:
                raise _told(content, answer.status_code)
            return content

        request_id = f"sample.{sampler}.{body.seq_id}"
        self._futures.start(account, request_id, sample)
        sequences = [f"{sampler}:{body.seq_id}:{i}" for i in range(body.num_samples)]
        return JSONResponse(_promise(request_id) | {"sample_sequence_ids": sequences})

    # ----------------------------------------------------------------------------------------------------- futures

    def _own(self, account: str, request_id: str, work: Callable[[], Awaitable[bytes]]) -> Response:
        self._futures.start(account, request_id, work)
        return JSONResponse(_promise(request_id))

    def _failed(self, request: Request, error: FireboxError) -> Response:
        return JSONResponse(_promise(self._futures.failed(request.scope["account"], error)))

    async def _retrieve(self, request: Request) -> Response:
        request_id = _decode(await request.body(), _FutureBody).request_id
        worker, _, number = request_id.partition(".")
        try:
            if worker == _OWN:
                return await self._retrieve_own(request, request_id, number)
            address = await self._calls.trainer(request.scope["account"], worker)
            return await self._retrieve_from(request, address, request_id, number)
        except FireboxError as error:
            # Clients ask again at once, and for ever, after an error here: a failed future ends the wait.
            return JSONResponse(failure(error))

    async def _retrieve_own(self, request: Request, request_id: str, number: str) -> Response:
        content = await self._futures.wait(request.scope["account"], number, _HOLD_S)
        if content is None:
            return JSONResponse({"type": "try_again", "request_id": request_id, "queue_state": "active"})
        if number.startswith("sample.") and MEDIA_TYPE in request.headers.get("accept", ""):
            message = sample_result.to_proto(content)
            if message is not None:
                return Response(message, media_type=MEDIA_TYPE)
        return Response(content, media_type="application/json")

    async def _retrieve_from(self, request: Request, address: WorkerAddress, request_id: str, number: str) -> Response:
        body = msgspec.json.encode({"request_id": number})
        answer = await self._proxy.send(request, address, request.url.path, body)
        if int(answer.headers.get("content-length", _SMALL + 1)) > _SMALL:
            return relayed(answer)
        content = await answer.aread()
        if answer.status_code == 404:
            raise Unavailable(f"request_id: {request_id!r} is not known to its trainer any more; that was restarted")
        if answer.status_code != 200:
            raise _told(content, answer.status_code)
        if MEDIA_TYPE in answer.headers.get("content-type", ""):
            return relayed(answer, content)
        return Response(_in_clients_words(content, request_id), media_type="application/json")


def _in_clients_words(content: bytes, request_id: str) -> bytes:
    """A small JSON result, with this API's request ids and paths in place of the worker's."""
    result = msgspec.json.decode(content, type=_Result)
    told: dict[str, Any]
    if result.type == "try_again":
        told = {"request_id": request_id}
    elif result.path is None:
        return content
    elif result.type == "save_weights_for_sampler":
        path = tinker.of_artifact(result.path, "sampler")
        sampler = tinker.sampler_of(path)
        told = {"path": path.path} if sampler is None else {"path": None, "sampling_session_id": sampler}
        if path.type == "external":
            told["type"] = "save_weights_external"
    else:
        told = {"path": tinker.of_artifact(result.path, "training").path}
    return msgspec.json.encode(msgspec.json.decode(content, type=dict[str, Any]) | told)


def _model_of(raw: bytes, encoding: str | None, as_proto: bool) -> str | None:
    plain = decompress(raw, encoding, MAX_BODY_BYTES)
    return model_id_of(plain) if as_proto else _decode(plain, _Addressed).model_id


def _constant(answer: dict[str, Any]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return JSONResponse(answer)

    return handle


async def _config(request: Request) -> Response:
    return JSONResponse(client_config(_decode(await request.body(), _ConfigBody).sdk_version))


async def _json(result: Awaitable[dict[str, Any]]) -> bytes:
    return msgspec.json.encode(await result)


def _promise(request_id: str) -> dict[str, Any]:
    return {"request_id": f"{_OWN}.{request_id}", "model_id": None}


def _read(raw: bytes, kind: type[_B]) -> _B:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InvalidArgument(f"{field or 'body'}: {first['msg']}") from error


def _decode(raw: bytes, kind: type[_S]) -> _S:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"body: {error}") from error


def _told(content: bytes, status: int) -> FireboxError:
    """The error that a worker answered with, told again."""
    try:
        message = msgspec.json.decode(content, type=_Envelope).error.message
    except msgspec.DecodeError:
        message = f"the worker answered with status {status}"
    return InvalidArgument(message) if 400 <= status < 500 else Internal(message)
