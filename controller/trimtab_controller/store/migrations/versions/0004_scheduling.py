"""Scheduling: taints and owners of hosts, what is counted on them, what vms wish for, the digest of a decision's inputs."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("host", sa.Column("taints", _JSON, nullable=False, server_default="[]"))
    op.add_column("host", sa.Column("exclusive_project_id", sa.String(length=40), nullable=False, server_default=""))
    op.add_column("host", sa.Column("dedicated_cpus", sa.String(length=400), nullable=False, server_default=""))
    op.add_column("vm", sa.Column("wishes", _JSON, nullable=False, server_default="{}"))
    op.add_column("decision", sa.Column("inputs_sha256", sa.String(length=64), nullable=False, server_default=""))
    op.create_table(
        "host_stock",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("resource", sa.String(length=120), nullable=False),
        sa.Column("capacity", sa.BigInteger(), nullable=False),
        sa.Column("claimed", sa.BigInteger(), nullable=False, server_default="0"),
        sa.CheckConstraint("claimed >= 0 AND claimed <= capacity", name=op.f("ck_host_stock_claimed")),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_host_stock_host_id")),
        sa.PrimaryKeyConstraint("host_id", "resource", name=op.f("pk_host_stock")),
    )
    op.create_table(
        "claim_stock",
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("resource", sa.String(length=120), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("amount > 0", name=op.f("ck_claim_stock_amount")),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_claim_stock_host_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_claim_stock_vm_id")),
        sa.PrimaryKeyConstraint("vm_id", "host_id", "resource", name=op.f("pk_claim_stock")),
    )
