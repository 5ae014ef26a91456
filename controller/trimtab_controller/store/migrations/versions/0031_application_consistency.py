"""A policy may demand that the guest's applications were held by its own hook."""

import sqlalchemy as sa
from alembic import op

revision = "0031"
down_revision = "0030"


def upgrade() -> None:
    op.add_column("backup_policy", sa.Column("needs_application", sa.Boolean(), server_default=sa.false(), nullable=False))
