"""Fencing: encrypted secrets and asked-for tests of power devices; vms: delays of restarts, and those that failover gave up."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("fence_path", sa.Column("secret", sa.String(length=2000), server_default="", nullable=False))
    op.add_column("fence_path", sa.Column("test_wanted_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("vm", sa.Column("attention", sa.String(length=32), server_default="", nullable=False))
    op.add_column("vm", sa.Column("start_delay_s", sa.Integer(), server_default="0", nullable=False))
