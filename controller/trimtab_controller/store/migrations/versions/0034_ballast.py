"""Space that leases go on in when the disk of a PostgreSQL server is full. Without WAL: see `store/ballast_table.py`."""

import sqlalchemy as sa
from alembic import op

revision = "0034"
down_revision = "0033"


def upgrade() -> None:
    op.create_table(
        "ballast",
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("filler", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_ballast")),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE ballast SET UNLOGGED")
