"""Long-running operations: PENDING until `response` or `error` is set, then DONE for ever."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, Resource


class OperationRow(Resource, Base):
    __tablename__ = "operations"
    collection = "operations"

    request: Mapped[dict[str, Any]]
    response: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(default=None)
