"""Promotions: run the export child, judge its report, put the model in place.

Invariant: a model is registered only after the exported files, loaded again by the public libraries, gave the
trainer's own log-probs.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from typing import Final

import msgspec

from firebox.control.reconcile.driver import Driver
from firebox.control.services import checkpoints, models, operations
from firebox.control.services.context import Control
from firebox.control.tables.models import ModelRow
from firebox.control.tables.operations import OperationRow
from firebox.launch.child import run_child
from firebox.wire.errors import FailedPrecondition, Internal
from firebox.wire.worker import ExportReport, ExportRequest

_EXPORT_WITHIN_S: Final = 1800.0


class Promotions:
    def __init__(self, control: Control) -> None:
        self._control = control
        self.driver = Driver(control, OperationRow.collection, self._step, self._failed)

    async def recover(self) -> None:
        """Begin again what a stopped server left unfinished: an export that was cut off has left nothing behind."""
        for row in await operations.pending(self._control):
            self.driver.kick(row.name)

    async def _step(self, name: str) -> None:
        row = await operations.by_name(self._control, name)
        if row.state == operations.PENDING:
            model = await checkpoints.placed(self._control, row) or await self._export(row)
            await operations.finish(self._control, row, models.show(model).wire())

    async def _export(self, row: OperationRow) -> ModelRow:
        request, layout = row.request, self._control.layout
        snapshot, _ = await checkpoints.snapshot(self._control, row.account, request["job"], request["checkpoint"])
        scratch = layout.staging / uuid.uuid4().hex
        order = ExportRequest(
            chain=[str(snapshot)],
            model_dir=str(layout.model(row.account, request["base"].rpartition("/")[2])),
            out_dir=str(scratch),
        )
        try:
            answer = await run_child(["export"], msgspec.json.encode(order), _EXPORT_WITHIN_S)
            report = msgspec.json.decode(answer, type=ExportReport)
            model = await checkpoints.promoted_row(self._control, row, _accepted(report))
            return await models.place(self._control, model, scratch)
        finally:
            await asyncio.to_thread(shutil.rmtree, scratch, True)

    async def _failed(self, name: str, reason: str) -> None:
        row = await operations.by_name(self._control, name)
        await operations.finish(self._control, row, Internal(f"promotion failed: {reason}"))


def _accepted(report: ExportReport) -> dict[str, object]:
    """The facts of the exported model; raises FailedPrecondition when the export found it unlike the trained one."""
    if not report.ok:
        raise FailedPrecondition(f"the exported model was refused: {report.error}", reason="EXPORT_REFUSED")
    return {
        "kind": report.kind,
        "max_abs_diff": report.max_abs_diff,
        "parameter_count": report.parameter_count,
        "lora_rank": report.lora_rank,
        "target_modules": report.target_modules,
    }
