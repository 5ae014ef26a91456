"""The next key of a repository, backups of groups at one instant, recovery plans, and a quota of snapshots."""

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0020"


def upgrade() -> None:
    op.add_column("backup_repo", sa.Column("wrapped_next_key", sa.String(length=300), server_default="", nullable=False))
    op.add_column("backup_repo", sa.Column("next_key_id", sa.String(length=16), server_default="", nullable=False))
    op.add_column("backup_repo", sa.Column("is_next_key_saved", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("backup_repo", sa.Column("key_changed_at", sa.DateTime(timezone=True), nullable=True))
