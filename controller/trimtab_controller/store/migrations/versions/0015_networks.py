"""Security groups, and cards that may send as others."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0015"
down_revision = "0011"

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    # A vm of the previous release's code is in no group, and its cards send as themselves only.
    op.add_column("nic", sa.Column("allows_spoofing", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "secgroup",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project_id", sa.String(length=40), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("rules", _JSON, nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_secgroup_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_secgroup")),
    )
    op.create_index(
        "uq_secgroup_name_live",
        "secgroup",
        ["project_id", "name"],
        unique=True,
        sqlite_where=sa.text("deleted_at IS NULL"),
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "secgroup_member",
        sa.Column("secgroup_id", sa.String(length=40), nullable=False),
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["secgroup_id"], ["secgroup.id"], name=op.f("fk_secgroup_member_secgroup_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_secgroup_member_vm_id")),
        sa.PrimaryKeyConstraint("secgroup_id", "vm_id", name=op.f("pk_secgroup_member")),
    )
    op.create_index("ix_secgroup_member_vm_id", "secgroup_member", ["vm_id"], unique=False)
    op.create_table(
        "vm_firewall",
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("applied_generation", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("applied_generation <= generation", name=op.f("ck_vm_firewall_applied")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_vm_firewall_vm_id")),
        sa.PrimaryKeyConstraint("vm_id", name=op.f("pk_vm_firewall")),
    )
