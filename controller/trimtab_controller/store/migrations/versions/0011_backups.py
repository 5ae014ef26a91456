"""Backups: repositories with wrapped keys, policies, and what is known of each backup; a vm has a policy."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("vm", sa.Column("backup_policy_id", sa.String(length=40), server_default="", nullable=False))
    op.add_column("vm", sa.Column("backup_asked_at", sa.DateTime(timezone=True), nullable=True))
    # Nothing has ever written to it: it is made anew with what backups turned out to need.
    op.drop_table("backup")
    _backup_repo()
    _backup_policy()
    _backup()


def _backup_repo() -> None:
    op.create_table(
        "backup_repo",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("project_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("url", sa.String(length=500), nullable=False),
        sa.Column("host_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("settings", _JSON, nullable=False),
        sa.Column("wrapped_key", sa.String(length=300), nullable=False),
        sa.Column("wrapped_secret", sa.String(length=500), server_default="", nullable=False),
        sa.Column("key_id", sa.String(length=16), nullable=False),
        sa.Column("fleet_id", sa.String(length=40), nullable=False),
        sa.Column("repository_id", sa.String(length=64), server_default="", nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("problem", sa.String(length=1000), server_default="", nullable=False),
        sa.Column("is_adopted", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("kept_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("pruned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('folder', 'bucket')", name=op.f("ck_backup_repo_kind")),
        sa.CheckConstraint("state IN ('unconfirmed', 'opening', 'ready', 'failed')", name=op.f("ck_backup_repo_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backup_repo")),
    )
    op.create_index(
        "uq_backup_repo_name_live",
        "backup_repo",
        ["name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _backup_policy() -> None:
    op.create_table(
        "backup_policy",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("repo_id", sa.String(length=40), nullable=False),
        sa.Column("schedule", sa.String(length=120), nullable=False),
        sa.Column("zone", sa.String(length=64), server_default="UTC", nullable=False),
        sa.Column("jitter_s", sa.Integer(), server_default="0", nullable=False),
        sa.Column("keep_last", sa.Integer(), server_default="0", nullable=False),
        sa.Column("keep_hourly", sa.Integer(), server_default="0", nullable=False),
        sa.Column("keep_daily", sa.Integer(), server_default="0", nullable=False),
        sa.Column("keep_weekly", sa.Integer(), server_default="0", nullable=False),
        sa.Column("keep_monthly", sa.Integer(), server_default="0", nullable=False),
        sa.Column("keep_yearly", sa.Integer(), server_default="0", nullable=False),
        sa.Column("verify", sa.String(length=8), server_default="none", nullable=False),
        sa.Column("needs_filesystem", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("bandwidth_mib_s", sa.Integer(), server_default="0", nullable=False),
        sa.Column("max_age_s", sa.Integer(), server_default="0", nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("verify IN ('none', 'read', 'boot')", name=op.f("ck_backup_policy_verify")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_backup_policy_project_id")),
        sa.ForeignKeyConstraint(["repo_id"], ["backup_repo.id"], name=op.f("fk_backup_policy_repo_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backup_policy")),
    )
    op.create_index(
        "uq_backup_policy_name_live",
        "backup_policy",
        ["project_id", "name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )


def _backup() -> None:
    op.create_table(
        "backup",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("repo_id", sa.String(length=40), nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("vm_name", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("consistency", sa.String(length=16), server_default="", nullable=False),
        sa.Column("base_id", sa.String(length=40), server_default="", nullable=False),
        sa.Column("full_reason", sa.String(length=500), server_default="", nullable=False),
        sa.Column("downgrade", sa.String(length=500), server_default="", nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("dirty_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("read_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("level", sa.Integer(), server_default="0", nullable=False),
        sa.Column("verified_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("booted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("recovery_ms", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("problem", sa.String(length=1000), server_default="", nullable=False),
        sa.Column("held_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("manifest", _JSON, nullable=False),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('running', 'ready', 'damaged', 'failed')", name=op.f("ck_backup_state")),
        sa.CheckConstraint("level BETWEEN 0 AND 3", name=op.f("ck_backup_level")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_backup_project_id")),
        sa.ForeignKeyConstraint(["repo_id"], ["backup_repo.id"], name=op.f("fk_backup_repo_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backup")),
    )
    op.create_index("ix_backup_repo_id", "backup", ["repo_id"], unique=False)
    op.create_index("ix_backup_vm_id", "backup", ["vm_id", "created_at"], unique=False)
