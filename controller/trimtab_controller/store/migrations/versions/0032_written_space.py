"""What the volumes at a place of a pool have written: the rest of what is taken there is others', and is not claimed again."""

import sqlalchemy as sa
from alembic import op

revision = "0032"
down_revision = "0031"


def upgrade() -> None:
    op.add_column("pool_space", sa.Column("written_bytes", sa.BigInteger(), nullable=True))
