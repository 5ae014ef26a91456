"""Failover: power devices of hosts, the record of each loss with its evidence and its vms, and what operators told it."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    _failover()
    _failover_control()
    _fence_path()
    _failover_vm()


def _failover() -> None:
    op.create_table(
        "failover",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("proof", sa.String(length=16), server_default="", nullable=False),
        sa.Column("evidence", _JSON, nullable=False),
        sa.Column("fenced_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("returned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state IN ('lost', 'fenced', 'returned')", name=op.f("ck_failover_state")),
        sa.CheckConstraint("state <> 'fenced' OR proof <> ''", name=op.f("ck_failover_proof")),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_failover_host_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_failover")),
    )
    is_open = sa.text("state <> 'returned'")
    op.create_index("uq_failover_host_open", "failover", ["host_id"], unique=True, sqlite_where=is_open, postgresql_where=is_open)


def _failover_control() -> None:
    op.create_table(
        "failover_control",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("is_paused", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("frozen", sa.String(length=500), server_default="", nullable=False),
        sa.Column("released", _JSON, nullable=False),
        sa.Column("confirmed_off", _JSON, nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_failover_control")),
    )


def _fence_path() -> None:
    op.create_table(
        "fence_path",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("agent", sa.String(length=63), nullable=False),
        sa.Column("options", _JSON, nullable=False),
        sa.Column("secret_file", sa.String(length=400), server_default="", nullable=False),
        sa.Column("tested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("test_power", sa.String(length=16), server_default="", nullable=False),
        sa.Column("test_message", sa.String(length=400), server_default="", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_fence_path_host_id")),
        sa.PrimaryKeyConstraint("host_id", "position", name=op.f("pk_fence_path")),
    )


def _failover_vm() -> None:
    op.create_table(
        "failover_vm",
        sa.Column("failover_id", sa.String(length=40), nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("operation_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("why", sa.String(length=1000), server_default="", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('waiting', 'starting', 'running', 'failed')", name=op.f("ck_failover_vm_state")),
        sa.ForeignKeyConstraint(["failover_id"], ["failover.id"], name=op.f("fk_failover_vm_failover_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_failover_vm_vm_id")),
        sa.PrimaryKeyConstraint("failover_id", "vm_id", name=op.f("pk_failover_vm")),
    )
