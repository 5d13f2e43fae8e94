"""Training runs: one LoRA model each, which outlives the trainer that holds it."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, Resource


class TrainingRunRow(Resource, Base):
    """`model` is the registered base model's id and `base_model` what the client called it; `lora` the adapter's
    settings; `job` the pooled trainer. A LOADED run lives in process `worker` of that job; `parked` says where a PARKED
    one is saved: {checkpoint, next_seq_id}."""

    __tablename__ = "training_runs"
    collection = "trainingRuns"

    session: Mapped[str]
    base_model: Mapped[str]
    model: Mapped[str]
    lora: Mapped[dict[str, Any]]
    job: Mapped[str]
    worker: Mapped[str | None] = mapped_column(default=None)
    parked: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    user_metadata: Mapped[dict[str, Any] | None] = mapped_column(default=None)
