"""/api/v1: sampling sessions."""

from __future__ import annotations

from fastapi import APIRouter

from firebox.control.routes.deps import Caller, Ctx, Json
from firebox.control.services import samplers
from firebox.wire.tinker import CreateSampler

router = APIRouter(prefix="/api/v1", tags=["root"])


@router.post("/create_sampling_session")
async def create_sampler(control: Ctx, account: Caller, body: CreateSampler) -> Json:
    row = await samplers.create(control, account, body)
    return {"type": "create_sampling_session", "sampling_session_id": row.id}


@router.get("/samplers/{sampler}")
async def get_sampler(control: Ctx, account: Caller, sampler: str) -> Json:
    row = await samplers.get(control, account, sampler)
    return {"sampler_id": row.id, "base_model": row.base_model, "model_path": row.model_path}
