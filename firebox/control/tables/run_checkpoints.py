"""What clients say about a checkpoint of a training run. That it exists, only its directory says."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, Resource


class RunCheckpointRow(Resource, Base):
    """The id is the checkpoint's `tinker://` path; times are RFC 3339."""

    __tablename__ = "run_checkpoints"
    collection = "runCheckpoints"

    run: Mapped[str]
    expires_at: Mapped[str | None] = mapped_column(default=None)
    user_metadata: Mapped[dict[str, Any] | None] = mapped_column(default=None)
