"""How many resources there are, of all accounts, by state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from firebox.control.services.context import Control
from firebox.control.tables.api_keys import ApiKeyRow
from firebox.control.tables.deployments import DeploymentRow
from firebox.control.tables.models import ModelRow
from firebox.control.tables.operations import OperationRow
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.control.tables.training_runs import TrainingRunRow

_TABLES: Final = (ApiKeyRow, DeploymentRow, ModelRow, OperationRow, TrainerJobRow, TrainingRunRow)


async def by_state(control: Control) -> Mapping[tuple[str, str], int]:
    """(collection, state) to the number of rows."""

    def work(session: Session) -> dict[tuple[str, str], int]:
        return {
            (table.collection, state): number
            for table in _TABLES
            for state, number in session.execute(select(table.state, func.count()).group_by(table.state))
        }

    return await control.db.run(work)
