"""GET /v1/accounts/{account}/operations/{operation}"""

from __future__ import annotations

from fastapi import APIRouter

from firebox.control.routes.deps import Account, Ctx, Hold, Json
from firebox.control.services import operations

router = APIRouter(prefix="/v1/accounts/{account}/operations", tags=["operations"])


@router.get("/{operation}")
async def get_operation(control: Ctx, account: Account, operation: str, hold: Hold) -> Json:
    row = await operations.get(control, account, operation)
    return operations.show(await operations.settled(control, row, hold)).wire()
