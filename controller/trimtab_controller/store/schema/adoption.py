"""Vms that came from a libvirt domain of somebody's."""

import sqlalchemy as sa

from trimtab_controller.store.schema.base import Json, UtcDateTime, created_at, metadata, ref

adoption = sa.Table(
    "adoption",
    metadata,
    ref("vm_id", "vm.id", primary_key=True),
    ref("host_id", "host.id"),
    sa.Column("domain_name", sa.String(255), nullable=False),
    # As it was before; at most 256 KiB, without secrets.
    sa.Column("original_xml", sa.Text(), nullable=False),
    # What only that definition says, and what is otherwise once it is not in force any more.
    sa.Column("kept", Json, nullable=False),
    sa.Column("changes", Json, nullable=False),
    # Its disks as they were: target, path, volume_id.
    sa.Column("disks", Json, nullable=False),
    # What its host counted for it before.
    sa.Column("had_autostart", sa.Boolean(), nullable=False),
    sa.Column("unmanaged_vcpus", sa.Integer(), nullable=False),
    sa.Column("unmanaged_memory_mib", sa.BigInteger(), nullable=False),
    created_at(),
    # When the vm was first defined as Trimtab does; until then the original is in force.
    sa.Column("ended_at", UtcDateTime()),
)
