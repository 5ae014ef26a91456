"""Encrypted volumes and their sealed keys; pools of block storage (iSCSI, LVM-thin, Ceph RBD), some of whose volumes have numbers."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0025"

_BEFORE = "kind IN ('dir', 'nfs')"
_AFTER = "kind IN ('dir', 'nfs', 'iscsi', 'lvm_thin', 'rbd')"


def upgrade() -> None:
    # Rows of the previous release's code are right as they are: nothing is encrypted, nothing has a number.
    op.add_column("volume", sa.Column("is_encrypted", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("volume", sa.Column("unit", sa.String(16), nullable=False, server_default=""))
    op.create_index(
        "uq_volume_unit",
        "volume",
        ["pool_id", "unit"],
        unique=True,
        sqlite_where=sa.text("unit != ''"),
        postgresql_where=sa.text("unit != ''"),
    )
    op.create_table(
        "volume_key",
        sa.Column("volume_id", sa.String(length=40), nullable=False),
        sa.Column("sealed_key", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["volume_id"], ["volume.id"], name=op.f("fk_volume_key_volume_id")),
        sa.PrimaryKeyConstraint("volume_id", name=op.f("pk_volume_key")),
    )
    op.create_table(
        "pool_secret",
        sa.Column("pool_id", sa.String(length=40), nullable=False),
        sa.Column("sealed_secret", sa.String(length=500), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["pool_id"], ["pool.id"], name=op.f("fk_pool_secret_pool_id")),
        sa.PrimaryKeyConstraint("pool_id", name=op.f("pk_pool_secret")),
    )
    if op.get_bind().dialect.name == "sqlite":
        _widen_in_place()
    else:
        op.drop_constraint(op.f("ck_pool_kind"), "pool", type_="check")
        op.create_check_constraint(op.f("ck_pool_kind"), "pool", _AFTER)


def _widen_in_place() -> None:
    """Write the constraint into the table's definition: see migration 0016."""
    connection = op.get_bind()
    version = int(connection.exec_driver_sql("PRAGMA schema_version").scalar_one())
    connection.exec_driver_sql("PRAGMA writable_schema=ON")
    changed = connection.exec_driver_sql(
        "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE type = 'table' AND name = 'pool'", (_BEFORE, _AFTER)
    )
    assert changed.rowcount == 1
    connection.exec_driver_sql(f"PRAGMA schema_version={version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema=OFF")
