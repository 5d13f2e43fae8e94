"""Sampling sessions: a base model, or one immutable snapshot of a training run. A row never changes."""

from __future__ import annotations

from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, Resource


class SamplerRow(Resource, Base):
    """`model` is the registered base model's id and `base_model` what the client called it."""

    __tablename__ = "samplers"
    collection = "samplers"

    session: Mapped[str]
    base_model: Mapped[str]
    model: Mapped[str]
    model_path: Mapped[str | None] = mapped_column(default=None)
