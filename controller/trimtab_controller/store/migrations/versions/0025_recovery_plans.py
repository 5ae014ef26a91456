"""The next key of a repository, backups of groups at one instant, recovery plans, and a quota of snapshots."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0025"
down_revision = "0023"

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.add_column("backup_repo", sa.Column("wrapped_next_key", sa.String(length=300), server_default="", nullable=False))
    op.add_column("backup_repo", sa.Column("next_key_id", sa.String(length=16), server_default="", nullable=False))
    op.add_column("backup_repo", sa.Column("is_next_key_saved", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("backup_repo", sa.Column("key_changed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("backup_policy", sa.Column("is_together", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("backup_policy", sa.Column("recovers_lost", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("project", sa.Column("snapshots_quota", sa.Integer(), nullable=True))
    op.add_column("project", sa.Column("snapshots_used", sa.Integer(), server_default="0", nullable=False))
    op.execute(
        "UPDATE project SET snapshots_used = (SELECT count(*) FROM snapshot JOIN vm ON vm.id = snapshot.vm_id"
        " WHERE vm.project_id = project.id AND snapshot.deleted_at IS NULL AND NOT snapshot.is_temporary)"
    )
    _backup_instant()
    _recovery_plan()


def _backup_instant() -> None:
    op.create_table(
        "backup_instant",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("repo_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("members", _JSON, nullable=False),
        sa.Column("skew_ms", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("pause_ms", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("problem", sa.String(length=1000), server_default="", nullable=False),
        sa.Column("taken_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('running', 'consistent', 'broken')", name=op.f("ck_backup_instant_state")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_backup_instant_project_id")),
        sa.ForeignKeyConstraint(["repo_id"], ["backup_repo.id"], name=op.f("fk_backup_instant_repo_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backup_instant")),
    )
    op.create_index("ix_backup_instant_project_id", "backup_instant", ["project_id", "created_at"], unique=False)


def _recovery_plan() -> None:
    op.create_table(
        "recovery_plan",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("repo_id", sa.String(length=40), nullable=False),
        sa.Column("groups", _JSON, nullable=False),
        sa.Column("networks", _JSON, nullable=False),
        sa.Column("pools", _JSON, nullable=False),
        sa.Column("cpu_model", sa.String(length=80), server_default="auto", nullable=False),
        sa.Column("last_run", _JSON, nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_recovery_plan_project_id")),
        sa.ForeignKeyConstraint(["repo_id"], ["backup_repo.id"], name=op.f("fk_recovery_plan_repo_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_recovery_plan")),
    )
    op.create_index(
        "uq_recovery_plan_name_live",
        "recovery_plan",
        ["project_id", "name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
