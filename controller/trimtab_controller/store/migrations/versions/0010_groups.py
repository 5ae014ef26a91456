"""Admission control: what a host class accepts, and the code with which a placement was refused."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    # The defaults are what the previous release's code does and says.
    op.add_column("host_class", sa.Column("admission", sa.String(16), nullable=False, server_default="any"))
    op.add_column("placement_request", sa.Column("refusal_code", sa.String(40), nullable=False, server_default="no-host-fits"))
