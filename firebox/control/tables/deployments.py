"""Deployments: what is wanted (replicas, generation, snapshot) and which workers serve."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from firebox.control.tables.base import Base, Resource


class DeploymentRow(Resource, Base):
    """`generation` grows when replicas must be replaced; `workers` lists {ident, generation}; `desired` is the wanted
    snapshot: {identity, path, previous, sequence}. A `pooled` one is the server's own and serves samplers."""

    __tablename__ = "deployments"
    collection = "deployments"

    status_message: Mapped[str] = mapped_column(default="")
    request: Mapped[dict[str, Any]]
    pooled: Mapped[bool] = mapped_column(default=False)
    generation: Mapped[int] = mapped_column(default=1)
    workers: Mapped[list[dict[str, Any]]] = mapped_column(default=list)
    desired: Mapped[dict[str, Any] | None] = mapped_column(default=None)
