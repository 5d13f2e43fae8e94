"""The trainer's HTTP surface: JSON in, one request id out, results by long poll.

Owns routes and status codes. Does not know ordering (`session`) or computation (`engine`), and checks no credentials:
whoever serves this app does.

Invariant: a body that names its model is answered with a request id, and what is wrong with it is told by that
future; only a body without a readable address gets a 4xx. No error body is empty.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tokenizers import Tokenizer

from firebox.trainer import services
from firebox.trainer.engine import Engine, EngineThread
from firebox.trainer.journal import digest_of
from firebox.trainer.services import Handler
from firebox.trainer.session import Future, Session
from firebox.wire import training as wire
from firebox.wire.errors import FireboxError, Internal, InvalidArgument, NotFound, envelope
from firebox.wire.worker import TrainerSpec

_HOLD_S: Final = 25.0
_STOP_S: Final = 2.0
_BIG_BODY: Final = 256 * 1024

_T = TypeVar("_T")
Decode = Callable[[bytes], wire.Operation]

_OPERATIONS: Final[dict[str, Decode]] = {
    "forward": wire.decode_forward,
    "forward_backward": wire.decode_forward_backward,
    "optim_step": wire.decode_optim_step,
    "save_weights": wire.decode_save_state,
    "load_weights": wire.decode_load_state,
    "save_weights_for_sampler": wire.decode_save_for_sampler,
    "load_adapter": wire.decode_load_adapter,
}


class _FutureBody(msgspec.Struct):
    request_id: str


def build_app(spec: TrainerSpec) -> Starlette:
    """Load the model, which blocks, and return the app that trains it."""
    Path(spec.job_dir).mkdir(parents=True, exist_ok=True)
    engine = Engine(spec)
    tokenizer_file = Path(spec.model_dir) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_file)) if tokenizer_file.exists() else None

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        thread = EngineThread(engine)
        session = Session(thread.submit)
        yield {"spec": spec, "session": session, "architecture": engine.architecture, "tokenizer": tokenizer}
        await asyncio.to_thread(thread.stop, _STOP_S)

    posts: dict[str, Handler] = {
        "client/config": services.constant({"proto_write_fwdbwd": False, "proto_compress_fwdbwd": False}),
        "create_session": services.create_session,
        "session_heartbeat": services.session_heartbeat,
        "telemetry": services.constant({"status": "accepted"}),
        "create_model": _create_model,
        "unload_model": _unload_model,
        "get_info": services.get_info,
        "tokenizer/encode": services.encode_text,
        "retrieve_future": _retrieve_future,
    } | {name: _operation(name, decode) for name, decode in _OPERATIONS.items()}
    gets: dict[str, Handler] = {
        "healthz": services.constant({"status": "ok"}),
        "get_server_capabilities": services.capabilities,
        "list_checkpoints": services.list_checkpoints,
    }
    return Starlette(
        routes=[
            *(Route(f"/api/v1/{path}", handler, methods=["POST"]) for path, handler in posts.items()),
            *(Route(f"/api/v1/{path}", handler, methods=["GET"]) for path, handler in gets.items()),
            Route("/worker/status", services.status, methods=["GET"]),
        ],
        lifespan=lifespan,
        exception_handlers={FireboxError: _on_error, HTTPException: _on_http_error, Exception: _on_bug},
    )


# ------------------------------------------------------------------------------------------------------- operations


def _operation(name: str, decode: Decode) -> Handler:
    async def handle(request: Request) -> Response:
        body = await request.body()
        address = await _off_loop(body, wire.decode_address, wire.OperationAddress)
        operation = await _decode(body, decode)
        return _accepted(request.state.session.accept(address, digest_of(name, body), operation))

    return handle


async def _create_model(request: Request) -> Response:
    body = await request.body()
    address = wire.decode_address(body, wire.CreateModelAddress)
    operation = await _decode(body, wire.decode_create_model)
    return _accepted(request.state.session.create_model(address, digest_of("create_model", body), operation))


async def _unload_model(request: Request) -> Response:
    address = wire.decode_address(await request.body(), wire.OperationAddress)
    return _accepted(request.state.session.unload_model(address.model_id))


async def _retrieve_future(request: Request) -> Response:
    request_id = (await services.read_body(request, _FutureBody)).request_id
    result = await request.state.session.wait(request_id, _HOLD_S)
    if result is None:
        return JSONResponse({"type": "try_again", "request_id": request_id, "queue_state": "active"})
    return Response(wire.encode_result(result), media_type="application/json")


async def _decode(body: bytes, decode: Decode) -> wire.Operation | wire.Failed:
    try:
        return await _off_loop(body, decode)
    except InvalidArgument as error:
        return wire.failed(error)


async def _off_loop(body: bytes, decode: Callable[..., _T], *args: Any) -> _T:
    """Big bodies are decoded beside the event loop, so that they do not hold up the others."""
    return await asyncio.to_thread(decode, body, *args) if len(body) > _BIG_BODY else decode(body, *args)


def _accepted(future: Future) -> Response:
    return JSONResponse({"request_id": future.request_id, "model_id": None})


# ----------------------------------------------------------------------------------------------------------- errors


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FireboxError)
    return JSONResponse(envelope(error), status_code=error.status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = NotFound(f"{request.method} {request.url.path}: {error.detail}; there is no such call")
    return JSONResponse(envelope(told), status_code=error.status_code)


async def _on_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(envelope(Internal(f"{type(error).__name__}: {error}")), status_code=500)
