"""What every table shares: the declarative base, the key (account, id), state and times."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from firebox.wire.names import resource


def rfc3339(time: datetime) -> str:
    """A time in UTC with microseconds; texts of this form sort by time."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def now() -> str:
    return rfc3339(datetime.now(UTC))


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, list[dict[str, Any]]: JSON}


class Resource:
    """Mixin of the named resources. `collection` is the segment of the resource name."""

    collection: ClassVar[str]

    account: Mapped[str] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    create_time: Mapped[str] = mapped_column(default=now)
    update_time: Mapped[str] = mapped_column(default=now, onupdate=now)

    @property
    def name(self) -> str:
        return resource(self.account, self.collection, self.id)
