"""Accounts: what resources belong to. One is there from its first key on."""

from __future__ import annotations

from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, now


class AccountRow(Base):
    __tablename__ = "accounts"

    id: Mapped[str] = mapped_column(primary_key=True)
    create_time: Mapped[str] = mapped_column(default=now)
