"""/v1/accounts/{account}/trainingSessions: the checkpoints of a root session's runs, and their promotion to models."""

from __future__ import annotations

from fastapi import APIRouter

from firebox.control.routes.checkpoints import promoted
from firebox.control.routes.deps import Account, Ctx, Json
from firebox.control.services import checkpoints, run_checkpoints, sessions, training_runs
from firebox.control.services.context import page
from firebox.wire.control import PromoteOfSession

router = APIRouter(prefix="/v1/accounts/{account}/trainingSessions/{session}", tags=["root"])


@router.get("/checkpoints")
async def list_checkpoints(
    control: Ctx, account: Account, session: str, pageSize: int = 0, pageToken: str = ""
) -> Json:
    rows, following = page(await run_checkpoints.of_session(control, account, session), pageSize, pageToken)
    return {"trainingSessionCheckpoints": [row.wire() for row in rows], "nextPageToken": following}


@router.post("/checkpoints/{checkpoint}:promote")
async def promote_checkpoint(
    control: Ctx, account: Account, session: str, checkpoint: str, body: PromoteOfSession
) -> Json:
    request = await run_checkpoints.promotion(control, account, session, checkpoint, body)
    return await promoted(control, await checkpoints.promote(control, account, checkpoint, request))


@router.delete("")
async def delete_session(control: Ctx, account: Account, session: str) -> Json:
    await sessions.finish(control, account, session)
    await training_runs.end(control, account, session)
    return {}
