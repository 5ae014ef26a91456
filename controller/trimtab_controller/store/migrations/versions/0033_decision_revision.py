"""What state of the fleet a decision read, as the newest event of that moment; decisions made before do not say."""

import sqlalchemy as sa
from alembic import op

revision = "0033"
down_revision = "0032"


def upgrade() -> None:
    op.add_column("decision", sa.Column("fleet_revision", sa.BigInteger(), nullable=True))
