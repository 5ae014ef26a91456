"""Adoption: vms that came from a libvirt domain keep its definition until their next stop."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0019"
down_revision = "0018"
_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "adoption",
        sa.Column("vm_id", sa.String(length=40), nullable=False),
        sa.Column("host_id", sa.String(length=40), nullable=False),
        sa.Column("domain_name", sa.String(length=255), nullable=False),
        sa.Column("original_xml", sa.Text(), nullable=False),
        sa.Column("kept", _JSON, nullable=False),
        sa.Column("changes", _JSON, nullable=False),
        sa.Column("disks", _JSON, nullable=False),
        sa.Column("had_autostart", sa.Boolean(), nullable=False),
        sa.Column("unmanaged_vcpus", sa.Integer(), nullable=False),
        sa.Column("unmanaged_memory_mib", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["host_id"], ["host.id"], name=op.f("fk_adoption_host_id")),
        sa.ForeignKeyConstraint(["vm_id"], ["vm.id"], name=op.f("fk_adoption_vm_id")),
        sa.PrimaryKeyConstraint("vm_id", name=op.f("pk_adoption")),
    )
