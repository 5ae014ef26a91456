"""What a host's lease may be counted on for: its warden, how long it takes to kill, and where it renews besides."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "host_guard",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("is_armed", sa.Boolean(), nullable=False),
        sa.Column("kill_ms", sa.Integer(), nullable=False),
        sa.Column("beacon_pool_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("kill_ms >= 0", name=op.f("ck_host_guard_kill_ms")),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_host_guard_host_id")),
        sa.PrimaryKeyConstraint("host_id", name=op.f("pk_host_guard")),
    )
