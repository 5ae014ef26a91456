"""What the guest of a boot test has to show, as its policy says: a pattern on its serial port, a TCP port that answers."""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"


def upgrade() -> None:
    op.add_column("backup_policy", sa.Column("verify_pattern", sa.String(length=200), server_default="", nullable=False))
    op.add_column("backup_policy", sa.Column("verify_tcp", sa.Integer(), server_default="0", nullable=False))
