"""The trainer's HTTP surface: JSON or protobuf in, one request id out, results by long poll.

Owns routes, status codes and which codec reads or writes a body: Content-Type and Accept decide, never who is asking.
Does not know ordering (`session`) or computation (`engine`), and checks no credentials: whoever serves this app does.

Invariant: a body that names its model is answered with a request id, and what is wrong with it is told by that
future; only a body without a readable address gets a 4xx. No error body is empty.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tokenizers import Tokenizer

from firebox.trainer import runs, services
from firebox.trainer.bodies import CODEC_THREADS, decoded, encoded, read_json
from firebox.trainer.engine import Engine
from firebox.trainer.journal import digest_of
from firebox.trainer.services import Handler
from firebox.trainer.session import Future, Session
from firebox.trainer.silence import put_away_silent
from firebox.trainer.turns import EngineThread
from firebox.wire import training_json, training_proto
from firebox.wire.client_config import DYNAMIC_CONFIG
from firebox.wire.errors import FireboxError, Internal, InvalidArgument, NotFound, envelope, headers
from firebox.wire.training import CreateModelAddress, ForwardOutput, OperationAddress
from firebox.wire.training import Request as TrainingRequest
from firebox.wire.worker import TrainerSpec

_HOLD_S: Final = 25.0
_STOP_S: Final = 2.0

_T = TypeVar("_T", OperationAddress, CreateModelAddress)


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
        session = Session(thread.submit, pooled=spec.pooled)
        with ThreadPoolExecutor(CODEC_THREADS, "codec") as codec, put_away_silent(session):
            yield {
                "spec": spec,
                "session": session,
                "codec": codec,
                "architecture": engine.architecture,
                "tokenizer": tokenizer,
            }
        await asyncio.to_thread(thread.stop, _STOP_S)

    posts: dict[str, Handler] = {
        "client/config": services.config,
        "client/dynamic_config": services.constant(DYNAMIC_CONFIG),
        "create_session": services.create_session,
        "session_heartbeat": services.session_heartbeat,
        "sessions/{session_id}/finish": services.finish_session,
        "telemetry": services.constant({"status": "accepted"}),
        "create_model": _create_model,
        "unload_model": _unload_model,
        "get_info": services.get_info,
        "tokenizer/encode": services.encode_text,
        "retrieve_future": _retrieve_future,
    } | {route: _operation(route) for route in training_json.OPERATIONS}
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
            Route("/worker/runs", runs.create, methods=["POST"]),
            Route("/worker/runs/park", runs.park, methods=["POST"]),
            Route("/worker/runs/refuse", runs.refuse, methods=["POST"]),
            Route("/worker/save_all", runs.save_all, methods=["POST"]),
        ],
        lifespan=lifespan,
        exception_handlers={
            FireboxError: _on_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
    )


# ------------------------------------------------------------------------------------------------------- operations


def _operation(route: str) -> Handler:
    async def handle(request: Request) -> Response:
        decode: Callable[[bytes], TrainingRequest[OperationAddress]] = partial(training_json.decode_operation, route)
        if request.headers.get("content-type", "").startswith(training_proto.MEDIA_TYPE):
            if route != "forward_backward":
                raise InvalidArgument(f"Content-Type: {route} is read as JSON only")
            decode = training_proto.decode_forward_backward
        (address, operation, canonical), digest = await decoded(request, _with_digest(route, decode))
        return _accepted(request.state.session.accept(address, digest, operation, len(canonical)))

    return handle


async def _create_model(request: Request) -> Response:
    decode = _with_digest("create_model", training_json.decode_create_model)
    (address, operation, _), digest = await decoded(request, decode)
    return _accepted(request.state.session.create_model(address, digest, operation))


async def _unload_model(request: Request) -> Response:
    address = await decoded(request, partial(training_json.decode_address, kind=OperationAddress))
    return _accepted(request.state.session.unload_model(address.model_id))


async def _retrieve_future(request: Request) -> Response:
    request_id = (await read_json(request, _FutureBody)).request_id
    result = await request.state.session.wait(request_id, _HOLD_S)
    if result is None:
        return JSONResponse({"type": "try_again", "request_id": request_id, "queue_state": "active"})
    if not isinstance(result, ForwardOutput):
        return Response(training_json.encode_result(result), media_type="application/json")
    as_proto = training_proto.MEDIA_TYPE in request.headers.get("accept", "")
    encode = training_proto.encode_output if as_proto else training_json.encode_result
    content = await encoded(request, partial(encode, result))
    return Response(content, media_type=training_proto.MEDIA_TYPE if as_proto else "application/json")


def _with_digest(
    route: str, decode: Callable[[bytes], TrainingRequest[_T]]
) -> Callable[[bytes], tuple[TrainingRequest[_T], bytes]]:
    def run(body: bytes) -> tuple[TrainingRequest[_T], bytes]:
        request = decode(body)
        return request, digest_of(route, request.canonical)

    return run


def _accepted(future: Future) -> Response:
    return JSONResponse({"request_id": future.request_id, "model_id": None})


# ----------------------------------------------------------------------------------------------------------- errors


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FireboxError)
    return JSONResponse(envelope(error), error.status, headers(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = NotFound(f"{request.method} {request.url.path}: {error.detail}; there is no such call")
    return JSONResponse(envelope(told), status_code=error.status_code)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it


async def _on_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(envelope(Internal(f"{type(error).__name__}: {error}")), status_code=500)
