"""Storage: volumes move between pools, and both places are known until one is proven gone; NFS pools; pools that do not answer."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"

_CHECKS = (
    ("pool", "ck_pool_kind", "kind IN ('dir')", "kind IN ('dir', 'nfs')"),
    (
        "pool_host",
        "ck_pool_host_state",
        "state IN ('unknown', 'ready', 'failed')",
        "state IN ('unknown', 'ready', 'failed', 'unresponsive')",
    ),
)


def upgrade() -> None:
    # Rows of the previous release's code are right as they are: nothing moves.
    op.add_column("volume", sa.Column("other_pool_id", sa.String(40), nullable=True))
    op.add_column("volume", sa.Column("other_host_id", sa.String(40), nullable=False, server_default=""))
    op.add_column("volume", sa.Column("other_format", sa.String(16), nullable=False, server_default=""))
    op.add_column("volume", sa.Column("move_state", sa.String(16), nullable=False, server_default=""))
    op.create_index("ix_volume_other_pool_id", "volume", ["other_pool_id"], unique=False)
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for table, name, before, after in _CHECKS:
        if is_sqlite:
            _widen_in_place(table, before, after)
        else:
            op.drop_constraint(op.f(name), table, type_="check")
            op.create_check_constraint(op.f(name), table, after)


def _widen_in_place(table: str, before: str, after: str) -> None:
    """Write the constraint into the table's definition, as SQLite's documentation says for a change that no row can break.

    Copying the table, which is the other way, would drop a table that others refer to.
    """
    connection = op.get_bind()
    version = int(connection.exec_driver_sql("PRAGMA schema_version").scalar_one())
    connection.exec_driver_sql("PRAGMA writable_schema=ON")
    changed = connection.exec_driver_sql(
        "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE type = 'table' AND name = ?", (before, after, table)
    )
    assert changed.rowcount == 1, table
    connection.exec_driver_sql(f"PRAGMA schema_version={version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema=OFF")
