"""Trainer jobs. Rows are never removed: a deleted job stays as a tombstone, so that its checkpoints stay listed."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, Resource


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
