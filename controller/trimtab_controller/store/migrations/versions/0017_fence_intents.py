"""The fence intent that was written in a silent host's slot on shared storage, and power cuts that operators asked for."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.create_table(
        "fence_intent",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("lease_number", sa.BigInteger(), nullable=False),
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("via_host_id", sa.String(length=40), nullable=False),
        sa.Column("begun_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("written_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_fence_intent_host_id")),
        sa.PrimaryKeyConstraint("host_id", name=op.f("pk_fence_intent")),
    )
    op.create_table(
        "power_cut",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("asked_by", sa.String(length=128), nullable=False),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_power_cut_host_id")),
        sa.PrimaryKeyConstraint("host_id", name=op.f("pk_power_cut")),
    )
