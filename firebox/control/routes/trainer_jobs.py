"""/v1/accounts/{account}/rlorTrainerJobs"""

from __future__ import annotations

from fastapi import APIRouter

from firebox.control.routes.deps import CREATE_HOLD_S, Account, Ctx, Hold, Json, Listing
from firebox.control.services import trainer_jobs, training_shapes
from firebox.control.services.context import page
from firebox.control.services.filters import search
from firebox.wire.control import CreateTrainerJob

router = APIRouter(prefix="/v1/accounts/{account}/rlorTrainerJobs", tags=["trainer jobs"])


@router.post("")
async def create_job(
    control: Ctx, account: Account, body: CreateTrainerJob, rlorTrainerJobId: str = "", trainingShape: str = ""
) -> Json:
    row = await trainer_jobs.create(control, account, body, rlorTrainerJobId, trainingShape)
    return trainer_jobs.show(control, await trainer_jobs.settled(control, row, CREATE_HOLD_S)).wire()


@router.get("")
async def list_jobs(
    control: Ctx, account: Account, query: Listing, pooled: bool = False, showDeleted: bool = False
) -> Json:
    rows = await trainer_jobs.listing(control, account, pooled=pooled, deleted=showDeleted)
    canonical = await training_shapes.canonical_names(control, account)
    found = search([trainer_jobs.show(control, row) for row in rows], query.filter, query.order_by, canonical)
    jobs, following = page(found, query.page_size, query.page_token)
    return {"rlorTrainerJobs": [job.wire() for job in jobs], "nextPageToken": following, "totalSize": len(found)}


@router.get("/{job}")
async def get_job(control: Ctx, account: Account, job: str, hold: Hold) -> Json:
    row = await trainer_jobs.get(control, account, job)
    return trainer_jobs.show(control, await trainer_jobs.settled(control, row, hold)).wire()


@router.delete("/{job}")
async def delete_job(control: Ctx, account: Account, job: str) -> Json:
    await trainer_jobs.settled(control, await trainer_jobs.delete(control, account, job), CREATE_HOLD_S)
    return {}


@router.post("/{job}:resume")
async def resume_job(control: Ctx, account: Account, job: str) -> Json:
    row = await trainer_jobs.resume(control, account, job)
    return trainer_jobs.show(control, await trainer_jobs.settled(control, row, CREATE_HOLD_S)).wire()


@router.post("/{job}:cancel")
async def cancel_job(control: Ctx, account: Account, job: str) -> Json:
    row = await trainer_jobs.cancel(control, account, job)
    return trainer_jobs.show(control, await trainer_jobs.settled(control, row, CREATE_HOLD_S)).wire()
