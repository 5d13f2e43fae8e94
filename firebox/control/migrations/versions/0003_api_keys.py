"""API keys with names, limits, last use and revocation. The one key of an older database becomes the operator's."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.rename_table("api_keys", "old_api_keys")
    op.create_table(
        "api_keys",
        sa.Column("account", sa.String, sa.ForeignKey("accounts.id"), primary_key=True),
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("create_time", sa.String, nullable=False),
        sa.Column("update_time", sa.String, nullable=False),
        sa.Column("sha256", sa.String, nullable=False, unique=True),
        sa.Column("display_name", sa.String, nullable=False),
        sa.Column("operator", sa.Boolean, nullable=False),
        sa.Column("last_used_time", sa.String),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("max_concurrent", sa.Integer),
    )
    op.execute(
        "INSERT INTO api_keys (account, id, state, create_time, update_time, sha256, display_name, operator) "
        "SELECT account, substr(sha256, 1, 8), 'ACTIVE', create_time, create_time, sha256, 'first', 1 FROM old_api_keys"
    )
    op.drop_table("old_api_keys")
