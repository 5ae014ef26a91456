"""A vm's shape may wait for its next stop; vms are installed from ISO images and know their operating system; volumes have limits."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # Zero: nothing waits. Rows of the previous release's code are right as they are.
    op.add_column("vm", sa.Column("next_vcpus", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("vm", sa.Column("next_memory_mib", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("vm", sa.Column("has_tpm", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("vm", sa.Column("os", sa.String(80), nullable=False, server_default=""))
    op.add_column("vm", sa.Column("os_family", sa.String(16), nullable=False, server_default="linux"))
    op.add_column("vm", sa.Column("has_cdrom", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("volume", sa.Column("iops_limit", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("volume", sa.Column("bandwidth_limit_mib_s", sa.Integer(), nullable=False, server_default="0"))
    # No foreign key: SQLite could only be given one by copying the table, and an image in a drive is not deleted anyway.
    op.add_column("vm", sa.Column("cdrom_image_id", sa.String(40), nullable=False, server_default=""))
