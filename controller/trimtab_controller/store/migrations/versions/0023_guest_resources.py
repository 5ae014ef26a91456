"""What guests get of their hosts: balloons, classes of cpu time; a second drive for drivers; and what was changed by hand."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0023"
down_revision = "0020"

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("vm", sa.Column("balloon_min_mib", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("vm", sa.Column("cpu_class", sa.String(length=16), nullable=False, server_default=""))
    op.add_column("vm", sa.Column("drivers_image_id", sa.String(length=40), nullable=False, server_default=""))
    op.add_column("vm", sa.Column("observed_balloon_mib", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("vm", sa.Column("hand_changes", _JSON, nullable=False, server_default="[]"))
    op.add_column("host_class", sa.Column("cpu_classes", _JSON, nullable=False, server_default="{}"))
