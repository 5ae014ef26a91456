"""What is known of a vm's guest agent, and since when: the doctor names those that went silent."""

import sqlalchemy as sa
from alembic import op

revision = "0030"
down_revision = "0029"


def upgrade() -> None:
    op.add_column("vm", sa.Column("guest_agent", sa.String(length=16), server_default="", nullable=False))
    op.add_column("vm", sa.Column("guest_agent_since", sa.DateTime(timezone=True), nullable=True))
