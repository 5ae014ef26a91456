"""Fencing: encrypted secrets and asked-for tests of power devices, what wardens said, delays of restarts."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("fence_path", sa.Column("secret", sa.String(length=2000), server_default="", nullable=False))
    op.add_column("fence_path", sa.Column("test_wanted_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("host", sa.Column("is_warden_armed", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("host", sa.Column("kill_ms", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("vm", sa.Column("attention", sa.String(length=32), server_default="", nullable=False))
    op.add_column("vm", sa.Column("start_delay_s", sa.Integer(), server_default="0", nullable=False))
