"""Volumes that are used before they are filled: from which disk of which backup each still reads."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.add_column("volume", sa.Column("fill_backup_id", sa.String(length=40), server_default="", nullable=False))
    op.add_column("volume", sa.Column("fill_disk", sa.String(length=8), server_default="", nullable=False))


def downgrade() -> None:
    op.drop_column("volume", "fill_disk")
    op.drop_column("volume", "fill_backup_id")
