"""Vms that start in order after a loss: a start group of their project, and their place in it."""

import sqlalchemy as sa
from alembic import op

revision = "0029"
down_revision = "0028"


def upgrade() -> None:
    op.add_column("vm", sa.Column("start_group", sa.String(length=63), server_default="", nullable=False))
    op.add_column("vm", sa.Column("start_order", sa.Integer(), server_default="0", nullable=False))
    in_one = sa.text("start_group != ''")
    op.create_index("ix_vm_start_group", "vm", ["start_group"], sqlite_where=in_one, postgresql_where=in_one)
