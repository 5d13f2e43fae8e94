"""/api/v1: sessions of Tinker clients, and what the server can do."""

from __future__ import annotations

from fastapi import APIRouter, Response

from firebox.control.routes.deps import Caller, Ctx, Json
from firebox.control.services import models, samplers, sessions, training_runs
from firebox.control.services.context import MAX_PAGE, window
from firebox.wire.tinker import CreateSession, Heartbeat

router = APIRouter(prefix="/api/v1", tags=["root"])


@router.get("/get_server_capabilities")
async def capabilities(control: Ctx, account: Caller) -> Json:
    rows = [row for row in await models.listing(control, account) if row.facts["kind"] == "HF_BASE_MODEL"]
    return {
        "supported_models": [
            {
                "model_name": name,
                "max_context_length": row.facts["context_length"],
                "trainable": True,
                "sampleable": True,
            }
            for row in rows
            for name in (row.id, *row.facts.get("aliases", ()))
        ]
    }


@router.post("/create_session")
async def create_session(control: Ctx, account: Caller, body: CreateSession) -> Json:
    row = await sessions.create(control, account, body)
    return {"type": "create_session", "session_id": row.id}


@router.post("/session_heartbeat")
async def heartbeat(control: Ctx, account: Caller, body: Heartbeat) -> Json:
    await sessions.touch(control, account, body.session_id)
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session}/finish")
async def finish_session(control: Ctx, account: Caller, session: str) -> Response:
    await sessions.finish(control, account, session)
    await training_runs.end(control, account, session)
    return Response(status_code=204)


@router.get("/sessions")
async def list_sessions(control: Ctx, account: Caller, limit: int = MAX_PAGE, offset: int = 0) -> Json:
    rows = await sessions.listing(control, account)
    return {"sessions": [row.id for row in window(rows, offset, limit)]}


@router.get("/sessions/{session}")
async def get_session(control: Ctx, account: Caller, session: str) -> Json:
    row = await sessions.get(control, account, session)
    runs = await training_runs.listing(control, account, session)
    return {
        "training_run_ids": [run.id for run in runs],
        "sampler_ids": [sampler.id for sampler in await samplers.listing(control, account, session)],
        "user_metadata": row.request.get("user_metadata"),
        "display_name": row.request.get("display_name"),
    }
