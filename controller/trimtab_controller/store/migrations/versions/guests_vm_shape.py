"""A vm's shape may wait for its next stop."""

import sqlalchemy as sa
from alembic import op

revision = "guests"
down_revision = "api"


def upgrade() -> None:
    # Zero: nothing waits. Rows of the previous release's code are right as they are.
    op.add_column("vm", sa.Column("next_vcpus", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("vm", sa.Column("next_memory_mib", sa.BigInteger(), nullable=False, server_default="0"))
