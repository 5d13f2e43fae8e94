"""API keys by the hash of the secret; the secret itself is never stored."""

from __future__ import annotations

from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, Resource


class ApiKeyRow(Resource, Base):
    """ACTIVE, then REVOKED for ever. An `operator` key manages the keys of every account. `last_used_time` is right to
    the minute; the limits are None for none."""

    __tablename__ = "api_keys"
    collection = "apiKeys"

    sha256: Mapped[str] = mapped_column(unique=True)
    display_name: Mapped[str]
    operator: Mapped[bool] = mapped_column(default=False)
    last_used_time: Mapped[str | None] = mapped_column(default=None)
    requests_per_minute: Mapped[int | None] = mapped_column(default=None)
    max_concurrent: Mapped[int | None] = mapped_column(default=None)
