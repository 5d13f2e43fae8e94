"""What the server asks of a pooled trainer: make the model of a training run, from nothing or a saved state; park one.
And of another one: save everything, because its job is about to be paused.

Owns the bodies and answers of these calls, which answer when the engine has done them. Does not know when a run is
parked, or why.

Invariant: a parked model is unloaded only after its state is safe, and what was accepted before is part of it.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from firebox.trainer.bodies import read_json
from firebox.trainer.journal import digest_of
from firebox.trainer.session import Future, Session
from firebox.wire.training import CreateModel, CreateModelAddress, Failed, OperationAddress, Result
from firebox.wire.training_json import encode_result
from firebox.wire.worker import CreateRun, ParkedRun, ParkRun, RefuseOperation, SavedAll, TrainerSpec


async def create(request: Request) -> Response:
    body = await read_json(request, CreateRun)
    session: Session = request.state.session
    address = CreateModelAddress(session_id=body.session_id, model_seq_id=body.model_seq_id)
    operation = CreateModel(base_model=body.base_model, lora_config=body.lora_config, state=body.state)
    return _json(encode_result(await _done(session.restore_model(address, operation, body.next_seq_id))))


async def park(request: Request) -> Response:
    body = await read_json(request, ParkRun)
    session: Session = request.state.session
    future, next_seq_id = session.save_model(body.model_id, body.checkpoint)
    result = await _done(future)
    if isinstance(result, Failed):
        return _json(encode_result(result))
    await _done(session.unload_model(body.model_id))
    return _json(msgspec.json.encode(ParkedRun(next_seq_id=next_seq_id)))


async def save_all(request: Request) -> Response:
    """Save what would end with this process; a pooled trainer's runs are parked instead."""
    spec: TrainerSpec = request.state.spec
    names = await request.state.session.save_all(shared_weights=not (spec.lora_rank or spec.forward_only))
    return _json(msgspec.json.encode(SavedAll(checkpoints=names)))


async def refuse(request: Request) -> Response:
    """An operation that the server could not make sense of: it takes its place and fails with the server's reason."""
    body = await read_json(request, RefuseOperation)
    address = OperationAddress(model_id=body.model_id, seq_id=body.seq_id)
    reason = Failed(error=body.error, category="user")
    future = request.state.session.accept(address, digest_of("refuse", body.error.encode()), reason)
    return _json(msgspec.json.encode({"request_id": future.request_id}))


async def _done(future: Future) -> Result:
    """The engine answers every command, so this ends; the server has its own deadline."""
    await future.done.wait()
    result = future.result
    assert result is not None
    return result


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")
