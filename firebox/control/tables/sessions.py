"""Sessions of Tinker clients: OPEN until the client says goodbye, then FINISHED. Who is alive is not stored."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Mapped

from firebox.control.tables.base import Base, Resource


class SessionRow(Resource, Base):
    """`request` is the create body: metadata and display name."""

    __tablename__ = "sessions"
    collection = "sessions"

    request: Mapped[dict[str, Any]]
