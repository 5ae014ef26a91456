"""Which gateway a host's newest session is with, so that the hosts of a dead gateway are told from those that another one hears."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("host", sa.Column("gateway_id", sa.String(40), nullable=False, server_default=""))
