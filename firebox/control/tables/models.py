"""Registered models. `facts` is what was read from the directory, see services.model_dir."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Mapped

from firebox.control.tables.base import Base, Resource


class ModelRow(Resource, Base):
    __tablename__ = "models"
    collection = "models"

    facts: Mapped[dict[str, Any]]
