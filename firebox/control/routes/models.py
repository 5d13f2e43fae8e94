"""/v1/accounts/{account}/models"""

from __future__ import annotations

from fastapi import APIRouter

from firebox.control.routes.deps import Account, Ctx, Json
from firebox.control.services import models
from firebox.control.services.context import page
from firebox.wire.control import CreateModel, UpdateModel

router = APIRouter(prefix="/v1/accounts/{account}/models", tags=["models"])


@router.get("")
async def list_models(control: Ctx, account: Account, pageSize: int = 0, pageToken: str = "") -> Json:
    rows, following = page(await models.listing(control, account), pageSize, pageToken)
    return {"models": [models.show(row).wire() for row in rows], "nextPageToken": following}


@router.post("")
async def create_model(control: Ctx, account: Account, body: CreateModel) -> Json:
    return models.show(await models.create(control, account, body)).wire()


@router.get("/{model}")
async def get_model(control: Ctx, account: Account, model: str) -> Json:
    return models.show(await models.get(control, account, model)).wire()


@router.patch("/{model}")
async def update_model(control: Ctx, account: Account, model: str, body: UpdateModel) -> Json:
    return models.show(await models.set_aliases(control, account, model, body.aliases)).wire()


@router.delete("/{model}")
async def delete_model(control: Ctx, account: Account, model: str) -> Json:
    await models.delete(control, account, model)
    return {}
