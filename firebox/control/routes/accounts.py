"""GET /v1/accounts: exactly the one account of the key."""

from __future__ import annotations

from fastapi import APIRouter

from firebox.control.routes.deps import Caller, Json
from firebox.control.services import accounts

router = APIRouter(prefix="/v1/accounts", tags=["accounts"])


@router.get("")
async def list_accounts(account: Caller) -> Json:
    return {"accounts": [accounts.show(account).wire()], "nextPageToken": ""}
