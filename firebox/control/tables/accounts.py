"""Accounts and the hashes of their API keys; a key itself is never stored here."""

from __future__ import annotations

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, now


class AccountRow(Base):
    __tablename__ = "accounts"

    id: Mapped[str] = mapped_column(primary_key=True)
    create_time: Mapped[str] = mapped_column(default=now)


class ApiKeyRow(Base):
    __tablename__ = "api_keys"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.id"))
    create_time: Mapped[str] = mapped_column(default=now)
