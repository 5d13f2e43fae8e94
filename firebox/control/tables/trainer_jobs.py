"""Trainer jobs and the states they may be in. Rows are never removed: a deleted job stays as a tombstone."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, Resource

PENDING: Final = "JOB_STATE_PENDING"
CREATING: Final = "JOB_STATE_CREATING"
RUNNING: Final = "JOB_STATE_RUNNING"
PAUSED: Final = "JOB_STATE_PAUSED"
FAILED: Final = "JOB_STATE_FAILED"
CANCELLING: Final = "JOB_STATE_CANCELLING"
CANCELLED: Final = "JOB_STATE_CANCELLED"
DELETING: Final = "JOB_STATE_DELETING"
DELETED: Final = "JOB_STATE_DELETED"
ARCHIVED: Final = "JOB_STATE_ARCHIVED"

TRANSITIONAL: Final = frozenset({CREATING, CANCELLING, DELETING})
"""States that a job leaves by itself within moments."""
RESUMABLE: Final = frozenset({PAUSED, FAILED, CANCELLED})
UNFINISHED: Final = frozenset({PENDING, CREATING, RUNNING, CANCELLING, DELETING})
"""States of jobs that have a worker, are to have one, or are getting rid of one."""
TOMBSTONES: Final = frozenset({DELETED, ARCHIVED})


class TrainerJobRow(Resource, Base):
    """`request` is the create body with names made canonical; `worker` the process that serves it, if any. A `pooled`
    job is the server's own and holds the training runs of one base model."""

    __tablename__ = "trainer_jobs"
    collection = "rlorTrainerJobs"

    status_message: Mapped[str] = mapped_column(default="")
    request: Mapped[dict[str, Any]]
    training_shape: Mapped[str]
    pooled: Mapped[bool] = mapped_column(default=False)
    worker: Mapped[str | None] = mapped_column(default=None)
