"""What a client asks of a trainer besides operations: sessions, facts about the model, the tokenizer, liveness.

Owns the bodies and answers of these calls. Does not know operations or their order; nothing here waits for the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tokenizers import Tokenizer

from firebox.trainer.bodies import decoded, read_json
from firebox.trainer.checkpoint import list_checkpoints as saved_checkpoints
from firebox.trainer.session import Session
from firebox.wire.client_config import client_config
from firebox.wire.errors import InvalidArgument, NotFound
from firebox.wire.training import OperationAddress
from firebox.wire.training_json import decode_address
from firebox.wire.worker import TrainerSpec

Handler = Callable[[Request], Awaitable[Response]]


_MAX_TEXT: Final = 2**20
"""Characters; this many take one to two seconds."""


class _ConfigBody(msgspec.Struct):
    sdk_version: str = ""


class _SessionBody(msgspec.Struct):
    session_id: str


class _TextBody(msgspec.Struct):
    text: str


def constant(answer: dict[str, Any]) -> Handler:
    async def handle(request: Request) -> Response:
        return JSONResponse(answer)

    return handle


async def config(request: Request) -> Response:
    return JSONResponse(client_config((await read_json(request, _ConfigBody)).sdk_version))


async def create_session(request: Request) -> Response:
    return JSONResponse({"session_id": request.state.session.open_session(), "type": "create_session"})


async def session_heartbeat(request: Request) -> Response:
    request.state.session.heard((await read_json(request, _SessionBody)).session_id)
    return JSONResponse({"type": "session_heartbeat"})


async def finish_session(request: Request) -> Response:
    """A client says goodbye. What it made stays until it is unloaded: another one may go on with it."""
    request.state.session.heard(request.path_params["session_id"])
    return JSONResponse({"type": "finish_session"})


async def get_info(request: Request) -> Response:
    spec: TrainerSpec = request.state.spec
    model_id = (await decoded(request, partial(decode_address, kind=OperationAddress))).model_id
    created = request.state.session.created(model_id)
    return JSONResponse(
        {
            "type": "get_info",
            "model_id": model_id,
            "model_data": {
                "arch": request.state.architecture,
                "model_name": spec.base_model,
                "tokenizer_id": spec.model_dir,
            },
            "model_name": spec.base_model,
            "is_lora": created.is_lora,
            "lora_rank": created.lora_rank,
        }
    )


async def capabilities(request: Request) -> Response:
    spec: TrainerSpec = request.state.spec
    model = {"model_name": spec.base_model, "max_context_length": spec.max_context_length}
    return JSONResponse({"supported_models": [model | {"trainable": not spec.forward_only, "sampleable": False}]})


async def list_checkpoints(request: Request) -> Response:
    names = await asyncio.to_thread(saved_checkpoints, Path(request.state.spec.job_dir))
    return JSONResponse({"checkpoints": names})


async def encode_text(request: Request) -> Response:
    tokenizer: Tokenizer | None = request.state.tokenizer
    text = (await read_json(request, _TextBody)).text
    if tokenizer is None:
        raise NotFound("the base model has no tokenizer.json; encode the text on the client")
    if len(text) > _MAX_TEXT:
        raise InvalidArgument(f"text: {len(text)} characters are more than {_MAX_TEXT}; send shorter pieces")
    encoding = await asyncio.to_thread(tokenizer.encode, text)
    return JSONResponse({"tokens": encoding.ids})


async def status(request: Request) -> Response:
    session: Session = request.state.session
    return JSONResponse({"job": request.state.spec.job, "models": session.model_ids, "pending": session.num_pending})
