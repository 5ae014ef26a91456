"""Snapshots: volumes have layers, snapshots say what they keep and how consistent it is; deleted volumes wait before they go."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    # Rows of the previous release's code are right as they are: every volume has its bottom layer, and nothing else.
    op.add_column("volume", sa.Column("layer_id", sa.String(40), nullable=False, server_default=""))
    op.add_column("volume", sa.Column("merge_layer_id", sa.String(40), nullable=True))
    op.add_column("volume", sa.Column("parent_layer_id", sa.String(40), nullable=False, server_default=""))
    op.add_column("volume", sa.Column("purge_after", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_volume_parent_volume_id", "volume", ["parent_volume_id"], unique=False)
    op.add_column("vm", sa.Column("current_snapshot_id", sa.String(40), nullable=False, server_default=""))
    op.create_table(
        "volume_layer",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.Column("parent_layer_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["volume_id"], ["volume.id"], name=op.f("fk_volume_layer_volume_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_volume_layer")),
    )
    op.create_index("ix_volume_layer_volume_id", "volume_layer", ["volume_id"], unique=False)
    op.add_column("snapshot", sa.Column("state", sa.String(16), nullable=False, server_default="ready"))
    op.add_column("snapshot", sa.Column("consistency", sa.String(16), nullable=False, server_default=""))
    op.add_column("snapshot", sa.Column("note", sa.String(500), nullable=False, server_default=""))
    op.add_column("snapshot", sa.Column("is_temporary", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("snapshot", sa.Column("vcpus", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("snapshot", sa.Column("memory_mib", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("snapshot", sa.Column("memory_bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_index("ix_snapshot_vm_id", "snapshot", ["vm_id"], unique=False)
