"""The root API: sessions, training runs, their checkpoints, samplers; jobs and deployments that the server makes."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


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
    for table in ("trainer_jobs", "deployments"):
        op.add_column(table, sa.Column("pooled", sa.Boolean, nullable=False, server_default=sa.false()))
    _resource("sessions", sa.Column("request", sa.JSON, nullable=False))
    _resource(
        "training_runs",
        sa.Column("session", sa.String, nullable=False, index=True),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("lora", sa.JSON, nullable=False),
        sa.Column("job", sa.String, nullable=False, index=True),
        sa.Column("worker", sa.String),
        sa.Column("parked", sa.JSON),
        sa.Column("user_metadata", sa.JSON),
    )
    _resource(
        "run_checkpoints",
        sa.Column("run", sa.String, nullable=False, index=True),
        sa.Column("expires_at", sa.String),
        sa.Column("user_metadata", sa.JSON),
    )
    _resource(
        "samplers",
        sa.Column("session", sa.String, nullable=False, index=True),
        sa.Column("base_model", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("model_path", sa.String),
    )
