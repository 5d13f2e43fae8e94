"""Checkpoints of a job, and their promotion to models."""

from __future__ import annotations

from fastapi import APIRouter

from firebox.control.routes.deps import Account, Ctx, Json
from firebox.control.services import checkpoints, operations
from firebox.control.services.context import Control, page
from firebox.control.tables.operations import OperationRow
from firebox.wire.control import Promote
from firebox.wire.errors import FailedPrecondition

router = APIRouter(prefix="/v1/accounts/{account}", tags=["checkpoints"])

_PROMOTE_HOLD_S = 240.0


@router.get("/rlorTrainerJobs/{job}/checkpoints")
async def list_checkpoints(control: Ctx, account: Account, job: str, pageSize: int = 0, pageToken: str = "") -> Json:
    rows, following = page(await checkpoints.listing(control, account, job), pageSize, pageToken)
    return {"checkpoints": [row.wire() for row in rows], "nextPageToken": following}


@router.delete("/rlorTrainerJobs/{job}/checkpoints/{checkpoint}")
async def delete_checkpoint(control: Ctx, account: Account, job: str, checkpoint: str) -> Json:
    await checkpoints.delete_state(control, account, job, checkpoint)
    return {}


@router.post("/checkpoints/{checkpoint}:promote")
async def promote_checkpoint(control: Ctx, account: Account, checkpoint: str, body: Promote) -> Json:
    return await promoted(control, await checkpoints.promote(control, account, checkpoint, body))


async def promoted(control: Control, row: OperationRow) -> Json:
    """The model itself when it is there in time, otherwise the operation to ask for later."""
    row = await operations.settled(control, row, _PROMOTE_HOLD_S)
    if row.error is not None:
        raise FailedPrecondition(str(row.error["message"]), reason="PROMOTION_FAILED")
    return {"model": row.response} if row.response is not None else {"operation": operations.show(row).wire()}
