"""The first schema: accounts, keys, models, trainer jobs, deployments, operations."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _resource(name: str, *columns: sa.Column[Any]) -> None:
    op.create_table(
        name,
        sa.Column("account", sa.String, sa.ForeignKey("accounts.id"), primary_key=True),
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("create_time", sa.String, nullable=False),
        sa.Column("update_time", sa.String, nullable=False),
        *columns,
    )


def upgrade() -> None:
    op.create_table(
        "accounts", sa.Column("id", sa.String, primary_key=True), sa.Column("create_time", sa.String, nullable=False)
    )
    op.create_table(
        "api_keys",
        sa.Column("sha256", sa.String, primary_key=True),
        sa.Column("account", sa.String, sa.ForeignKey("accounts.id"), nullable=False),
        sa.Column("create_time", sa.String, nullable=False),
    )
    _resource("models", sa.Column("facts", sa.JSON, nullable=False))
    _resource(
        "trainer_jobs",
        sa.Column("status_message", sa.String, nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("training_shape", sa.String, nullable=False),
        sa.Column("worker", sa.String),
    )
    _resource(
        "deployments",
        sa.Column("status_message", sa.String, nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("workers", sa.JSON, nullable=False),
        sa.Column("desired", sa.JSON),
    )
    _resource(
        "operations",
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("response", sa.JSON),
        sa.Column("error", sa.JSON),
    )
