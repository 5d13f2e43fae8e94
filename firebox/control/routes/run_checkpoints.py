"""/api/v1: checkpoints of training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from firebox.control.routes.deps import Caller, Ctx, Json
from firebox.control.services import run_checkpoints, training_runs
from firebox.control.services.context import MAX_PAGE, window
from firebox.control.services.downloads import ARCHIVE, Offer
from firebox.wire.errors import FailedPrecondition
from firebox.wire.tinker import DOWNLOADS, CheckpointPath, Cursor, SetTtl, WeightsInfoQuery, parse_path

router = APIRouter(prefix="/api/v1", tags=["root"])

Segment = Literal["weights", "sampler_weights", "external_weights"]


@router.get("/checkpoints")
async def list_all(control: Ctx, account: Caller, limit: int = MAX_PAGE, offset: int = 0) -> Json:
    found = (await run_checkpoints.listing(control, account))[::-1]
    shown = [checkpoint.model_dump(mode="json") for checkpoint in window(found, offset, limit)]
    cursor = Cursor(offset=offset, limit=limit, total_count=len(found))
    return {"checkpoints": shown, "cursor": cursor.model_dump()}


@router.get("/training_runs/{run}/checkpoints")
async def list_of_run(control: Ctx, account: Caller, run: str) -> Json:
    await training_runs.get(control, account, run)
    found = await run_checkpoints.listing(control, account, run)
    return {"checkpoints": [c.model_dump(mode="json") for c in found]}


@router.delete("/training_runs/{run}/checkpoints/{segment}/{name}")
async def delete_checkpoint(control: Ctx, account: Caller, run: str, segment: Segment, name: str) -> Response:
    await run_checkpoints.delete(control, account, _path(run, segment, name))
    return Response(status_code=204)


@router.put("/training_runs/{run}/checkpoints/{segment}/{name}/ttl")
async def set_ttl(control: Ctx, account: Caller, run: str, segment: Segment, name: str, body: SetTtl) -> Response:
    await run_checkpoints.set_ttl(control, account, _path(run, segment, name), body.ttl_seconds)
    return Response(status_code=204)


@router.post("/training_runs/{run}/checkpoints/{segment}/{name}/publish")
async def publish_checkpoint(control: Ctx, account: Caller, run: str, segment: Segment, name: str) -> Response:
    await run_checkpoints.locate(control, account, _path(run, segment, name))
    raise FailedPrecondition("this server has nobody to publish to; share the files instead")


@router.delete("/training_runs/{run}/checkpoints/{segment}/{name}/publish")
async def unpublish_checkpoint(control: Ctx, account: Caller, run: str, segment: Segment, name: str) -> Response:
    """Nothing is ever public, so this is done already."""
    await run_checkpoints.locate(control, account, _path(run, segment, name))
    return Response(status_code=204)


@router.get("/training_runs/{run}/checkpoints/{segment}/{name}/external_weights_urls")
async def file_urls(request: Request, control: Ctx, account: Caller, run: str, segment: Segment, name: str) -> Json:
    offer = await run_checkpoints.offer(control, account, _path(run, segment, name))
    urls = {file: _url(request, offer, file) for file in offer.files}
    return {"urls": urls, "expires": offer.expires.isoformat()}


@router.get("/training_runs/{run}/checkpoints/{segment}/{name}/archive")
async def archive_url(request: Request, control: Ctx, account: Caller, run: str, segment: Segment, name: str) -> Json:
    offer = await run_checkpoints.offer(control, account, _path(run, segment, name))
    return {"url": _url(request, offer, ARCHIVE), "expires": offer.expires.isoformat()}


@router.get("/downloads/{ticket}/{file:path}")
async def download(control: Ctx, ticket: str, file: str) -> FileResponse:
    if file != ARCHIVE:
        return FileResponse(control.downloads.file(ticket, file), filename=Path(file).name)
    packed = await control.downloads.archive(ticket, control.layout.staging)
    return FileResponse(packed, filename=ARCHIVE, background=BackgroundTask(packed.unlink))


@router.post("/weights_info")
async def weights_info(control: Ctx, account: Caller, body: WeightsInfoQuery) -> Json:
    path = parse_path(body.tinker_path, field="tinker_path")
    await run_checkpoints.locate(control, account, path)
    row = await training_runs.get(control, account, path.run)
    flags = {key: row.lora[key] for key in ("train_unembed", "train_mlp", "train_attn")}
    return {"base_model": row.base_model, "is_lora": True, "lora_rank": row.lora["rank"], **flags}


def _url(request: Request, offer: Offer, file: str) -> str:
    return f"{str(request.base_url).rstrip('/')}{DOWNLOADS}{offer.ticket}/{file}"


def _path(run: str, segment: Segment, name: str) -> CheckpointPath:
    return parse_path(f"tinker://{run}/{segment}/{name}", field="checkpoint")
