"""/v1/accounts/{account}/apiKeys. Who holds an operator's key may name any account here, or `-` for all."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from firebox.control.routes.deps import Ctx, Json, is_operator, own_account
from firebox.control.services import api_keys
from firebox.control.services.context import page
from firebox.wire.control import CreateApiKey
from firebox.wire.errors import PermissionDenied

router = APIRouter(prefix="/v1/accounts/{account}/apiKeys", tags=["API keys"])


def _any_account(request: Request, account: str) -> str:
    """The account in the path, for an operator."""
    if not is_operator(request):
        raise PermissionDenied("this key does not manage keys; use an operator's key", reason="NOT_OPERATOR")
    return account


def _seen_account(request: Request, account: str) -> str | None:
    """Whose keys are shown: any account's to an operator, all with `-`, and to others their own."""
    if is_operator(request):
        return None if account == "-" else account
    return own_account(request, account)


Managed = Annotated[str, Depends(_any_account)]
Seen = Annotated[str | None, Depends(_seen_account)]


@router.get("")
async def list_keys(control: Ctx, account: Seen, pageSize: int = 0, pageToken: str = "") -> Json:
    rows, following = page(await api_keys.listing(control, account), pageSize, pageToken)
    return {"apiKeys": [api_keys.show(row).wire() for row in rows], "nextPageToken": following}


@router.post("")
async def create_key(control: Ctx, account: Managed, body: CreateApiKey) -> Json:
    secret, row = await api_keys.create(control, body.model_copy(update={"account": account}))
    return api_keys.show(row, secret).wire()


@router.delete("/{key}")
async def revoke_key(control: Ctx, account: Managed, key: str) -> Json:
    return api_keys.show(await api_keys.revoke(control, account, key)).wire()
