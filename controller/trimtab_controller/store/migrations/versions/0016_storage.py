"""Storage: volumes move between pools; both places are known, and claimed, until one is proven gone."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0011"


def upgrade() -> None:
    # Rows of the previous release's code are right as they are: nothing moves.
    op.add_column("volume", sa.Column("other_pool_id", sa.String(40), nullable=True))
    op.add_column("volume", sa.Column("other_host_id", sa.String(40), nullable=False, server_default=""))
    op.add_column("volume", sa.Column("other_format", sa.String(16), nullable=False, server_default=""))
    op.add_column("volume", sa.Column("move_state", sa.String(16), nullable=False, server_default=""))
    op.create_index("ix_volume_other_pool_id", "volume", ["other_pool_id"], unique=False)
