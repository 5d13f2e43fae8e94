"""/api/v1/training_runs, and what a client asks about the model of one."""

from __future__ import annotations

from collections import defaultdict

from fastapi import APIRouter

from firebox.control.routes.deps import Caller, Ctx, Json
from firebox.control.services import models, run_checkpoints, training_runs
from firebox.control.services.context import MAX_PAGE, window
from firebox.wire.tinker import Cursor, ModelAddress, RunCheckpoint

router = APIRouter(prefix="/api/v1", tags=["root"])


@router.get("/training_runs")
async def list_runs(control: Ctx, account: Caller, limit: int = MAX_PAGE, offset: int = 0) -> Json:
    rows = await training_runs.listing(control, account)
    checkpoints: dict[str, list[RunCheckpoint]] = defaultdict(list)
    for checkpoint in await run_checkpoints.listing(control, account):
        checkpoints[checkpoint.path.run].append(checkpoint)
    shown = [training_runs.show(row, checkpoints[row.id]) for row in window(rows, offset, limit)]
    cursor = Cursor(offset=offset, limit=limit, total_count=len(rows))
    return {"training_runs": [run.model_dump(mode="json") for run in shown], "cursor": cursor.model_dump()}


@router.get("/training_runs/{run}")
async def get_run(control: Ctx, account: Caller, run: str) -> Json:
    row = await training_runs.get(control, account, run)
    return training_runs.show(row, await run_checkpoints.listing(control, account, run)).model_dump(mode="json")


@router.post("/get_info")
async def get_info(control: Ctx, account: Caller, body: ModelAddress) -> Json:
    row = await training_runs.get(control, account, body.model_id)
    model = await models.get(control, account, row.model)
    return {
        "type": "get_info",
        "model_id": row.id,
        "model_data": {
            "arch": model.facts["model_type"],
            "model_name": row.base_model,
            "tokenizer_id": str(control.layout.model(account, model.id)),
        },
        "model_name": row.base_model,
        "is_lora": True,
        "lora_rank": row.lora["rank"],
    }
