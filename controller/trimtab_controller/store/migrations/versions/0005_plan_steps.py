"""Plans: their steps while they are applied, and hosts in maintenance."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("plan", sa.Column("summary", sa.String(length=1000), server_default="", nullable=False))
    op.add_column("plan", sa.Column("operation_id", sa.String(length=40), server_default="", nullable=False))
    op.create_table(
        "plan_step",
        sa.Column("plan_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("target_host_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("operation_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("message", sa.String(length=1000), server_default="", nullable=False),
        sa.CheckConstraint(
            "state IN ('pending', 'stopping', 'running', 'done', 'skipped', 'failed', 'cancelled')",
            name=op.f("ck_plan_step_state"),
        ),
        sa.ForeignKeyConstraint(["plan_id"], ["plan.id"], name=op.f("fk_plan_step_plan_id")),
        sa.PrimaryKeyConstraint("plan_id", "position", name=op.f("pk_plan_step")),
    )
    op.create_index("ix_plan_step_state", "plan_step", ["state"], unique=False)
    op.create_table(
        "host_maintenance",
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("plan_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("was_cordoned", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("created_by", sa.String(length=80), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_host_maintenance_host_id")),
        sa.PrimaryKeyConstraint("host_id", name=op.f("pk_host_maintenance")),
    )
