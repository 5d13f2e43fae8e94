"""/v1/accounts/{account}/deployments, and the hot-load of snapshots into them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header

from firebox.control.routes.deps import CREATE_HOLD_S, Account, Caller, Ctx, Hold, Json
from firebox.control.services import deployments, hot_load
from firebox.control.services.context import page
from firebox.wire.control import CreateDeployment, HotLoad, UpdateDeployment
from firebox.wire.errors import NotFound

router = APIRouter(prefix="/v1/accounts/{account}/deployments", tags=["deployments"])
hot_load_router = APIRouter(prefix="/hot_load/v1/models/hot_load", tags=["deployments"])

DeploymentName = Annotated[str, Header(alias="fireworks-deployment")]


@router.post("")
async def create_deployment(control: Ctx, account: Account, body: CreateDeployment, deploymentId: str = "") -> Json:
    row = await deployments.create(control, account, body, deploymentId)
    return deployments.show(control, await deployments.settled(control, row, CREATE_HOLD_S) or row).wire()


@router.get("")
async def list_deployments(
    control: Ctx, account: Account, pageSize: int = 0, pageToken: str = "", pooled: bool = False
) -> Json:
    found = await deployments.listing(control, account, pooled=pooled)
    rows, following = page(found, pageSize, pageToken)
    shown = [deployments.show(control, row).wire() for row in rows]
    return {"deployments": shown, "nextPageToken": following, "totalSize": len(found)}


@router.get("/{deployment}")
async def get_deployment(control: Ctx, account: Account, deployment: str, hold: Hold) -> Json:
    row = await deployments.get(control, account, deployment)
    seen = await deployments.settled(control, row, hold)
    if seen is None:
        raise NotFound(f"deployment {deployment!r} has been deleted")
    return deployments.show(control, seen).wire()


@router.patch("/{deployment}")
async def update_deployment(
    control: Ctx, account: Account, deployment: str, body: UpdateDeployment, updateMask: str | None = None
) -> Json:
    row = await deployments.update(control, account, deployment, body, updateMask)
    return deployments.show(control, await deployments.settled(control, row, CREATE_HOLD_S) or row).wire()


@router.delete("/{deployment}")
async def delete_deployment(control: Ctx, account: Account, deployment: str) -> Json:
    row = await deployments.delete(control, account, deployment)
    await deployments.gone(control, row, CREATE_HOLD_S)
    return {}


@hot_load_router.post("")
async def request_hot_load(control: Ctx, account: Caller, body: HotLoad, deployment: DeploymentName = "") -> Json:
    row = await hot_load.target(control, account, deployment)
    sequence = await hot_load.request(control, account, row, body)
    await hot_load.done(control, row, sequence, CREATE_HOLD_S)
    return await hot_load.status(control, row)


@hot_load_router.get("")
async def hot_load_status(control: Ctx, account: Caller, hold: Hold, deployment: DeploymentName = "") -> Json:
    row = await hot_load.target(control, account, deployment)
    await hot_load.done(control, row, hot_load.wanted(row), hold)
    return await hot_load.status(control, row)
