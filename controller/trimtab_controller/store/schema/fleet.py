"""Hosts, their classes, join tokens, certificates and the leases of the control plane itself."""

import sqlalchemy as sa

from trimtab_controller.store.schema.base import (
    Json,
    UtcDateTime,
    created_at,
    deleted_at,
    id_column,
    metadata,
    ref,
    unique_among_live,
    version,
)

host_class = sa.Table(
    "host_class",
    metadata,
    id_column(),
    sa.Column("name", sa.String(63), nullable=False),
    # NULL: derived from the members' common baseline when the first vm needs it.
    sa.Column("cpu_model", sa.String(80)),
    sa.Column("machine", sa.String(80)),
    # Thousandths: 4000 = four vcpus for one cpu.
    sa.Column("vcpu_ratio_permille", sa.Integer(), nullable=False, server_default="4000"),
    sa.Column("memory_ratio_permille", sa.Integer(), nullable=False, server_default="1000"),
    sa.Column("memory_reserve_mib", sa.BigInteger(), nullable=False, server_default="1024"),
    sa.Column("policy", sa.String(40), nullable=False, server_default="best-fit"),
    # any, or one-host-loss: only what could be restarted after the loss of one host.
    sa.Column("admission", sa.String(16), nullable=False, server_default="any"),
    # What classes of cpu time mean on its hosts, by name: {weight, limit_percent}; one that is missing means what it means anywhere.
    sa.Column("cpu_classes", Json, nullable=False, server_default="{}"),
    version(),
    created_at(),
    deleted_at(),
)
unique_among_live("uq_host_class_name_live", host_class.c.name)

host = sa.Table(
    "host",
    metadata,
    id_column(),
    sa.Column("name", sa.String(63), nullable=False),
    ref("host_class_id", "host_class.id"),
    sa.Column("labels", Json, nullable=False),
    sa.Column("is_cordoned", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("agent_address", sa.String(200), nullable=False),
    sa.Column("migration_address", sa.String(80), nullable=False),
    sa.Column("machine_id", sa.String(64), nullable=False),
    sa.Column("smbios_uuid", sa.String(64), nullable=False),
    # What keeps vms off: [{key, value, effect}]; and the one project whose vms may run here.
    sa.Column("taints", Json, nullable=False, server_default="[]"),
    sa.Column("exclusive_project_id", sa.String(40), nullable=False, server_default=""),
    # Cpus set aside for pinning, as the operator wrote them (`4-15,20-31`); each is a row of `host_part`.
    sa.Column("dedicated_cpus", sa.String(400), nullable=False, server_default=""),
    # Observed. `incarnation` is the agent's: a command decided for another one is refused by the agent.
    sa.Column("connectivity", sa.String(16), nullable=False),
    sa.Column("connectivity_at", UtcDateTime(), nullable=False),
    sa.Column("boot_id", sa.String(64), nullable=False, server_default=""),
    sa.Column("incarnation", sa.String(64), nullable=False, server_default=""),
    sa.Column("lease_number", sa.BigInteger(), nullable=False, server_default="0"),
    # Of the newest session; '' before the first. While that gateway lives, only it judges the host's silence.
    sa.Column("gateway_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("inventory", Json),
    sa.Column("inventory_digest", sa.String(64), nullable=False, server_default=""),
    sa.Column("inventory_at", UtcDateTime()),
    # Claims. Only the leader writes them. `generation` moves with every change of claims.
    sa.Column("generation", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("vcpus_limit", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("memory_limit_mib", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("vcpus_claimed", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("memory_claimed_mib", sa.BigInteger(), nullable=False, server_default="0"),
    # Used by domains that are not ours; subtracted from the limit when placing, outside the CHECK since we do not rule them.
    sa.Column("unmanaged_vcpus", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("unmanaged_memory_mib", sa.BigInteger(), nullable=False, server_default="0"),
    version(),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("vcpus_claimed >= 0 AND vcpus_claimed <= vcpus_limit", name="vcpus"),
    sa.CheckConstraint("memory_claimed_mib >= 0 AND memory_claimed_mib <= memory_limit_mib", name="memory"),
    sa.CheckConstraint("connectivity IN ('new', 'up', 'suspect', 'lost', 'fenced')", name="connectivity"),
)
unique_among_live("uq_host_name_live", host.c.name)
unique_among_live("uq_host_machine_id_live", host.c.machine_id)
unique_among_live("uq_host_smbios_uuid_live", host.c.smbios_uuid)

# Parts that belong to at most one vm at a time: cpus set aside for pinning, PCI devices. `facts`: the NUMA cell, a device's kind.
host_part = sa.Table(
    "host_part",
    metadata,
    ref("host_id", "host.id", primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),  # cpu, numa_cell, pci
    sa.Column("part", sa.String(40), primary_key=True),  # cpu number, cell number, PCI address
    sa.Column("facts", Json, nullable=False),
    sa.Column("vm_id", sa.String(40)),
    sa.CheckConstraint("kind IN ('cpu', 'numa_cell', 'pci')", name="kind"),
)

# What is counted on a host besides vcpus, memory and space, by the scheduler's name of it: `device:gpu`, `resource:licence`,
# `cell:0:cpus`, `cell:0:pages:2048`. Claimed by conditional UPDATE, bounded by the CHECK.
host_stock = sa.Table(
    "host_stock",
    metadata,
    ref("host_id", "host.id", primary_key=True),
    sa.Column("resource", sa.String(120), primary_key=True),
    sa.Column("capacity", sa.BigInteger(), nullable=False),
    sa.Column("claimed", sa.BigInteger(), nullable=False, server_default="0"),
    sa.CheckConstraint("claimed >= 0 AND claimed <= capacity", name="claimed"),
)

host_token = sa.Table(
    "host_token",
    metadata,
    id_column(),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    # Set where the token re-admits a known host.
    sa.Column("host_id", sa.String(40)),
    sa.Column("expires_at", UtcDateTime(), nullable=False),
    sa.Column("used_at", UtcDateTime()),
    sa.Column("created_by", sa.String(80), nullable=False),
    created_at(),
)

host_certificate = sa.Table(
    "host_certificate",
    metadata,
    sa.Column("serial", sa.String(64), primary_key=True),
    ref("host_id", "host.id"),
    sa.Column("purpose", sa.String(16), nullable=False),
    sa.Column("not_after", UtcDateTime(), nullable=False),
    sa.Column("revoked_at", UtcDateTime()),
    created_at(),
)
sa.Index("ix_host_certificate_host_id", host_certificate.c.host_id)

# `engine`, `gateway/<id>`: whoever holds the row at its term may write under it.
lease = sa.Table(
    "lease",
    metadata,
    sa.Column("name", sa.String(80), primary_key=True),
    sa.Column("owner", sa.String(80), nullable=False),
    sa.Column("term", sa.BigInteger(), nullable=False),
    sa.Column("beat", sa.BigInteger(), nullable=False),
    sa.Column("ttl_ms", sa.Integer(), nullable=False),
    sa.Column("context", Json, nullable=False),
    sa.Column("renewed_at", UtcDateTime(), nullable=False),
)

# The end of all granting to a host: committed here, in force once every live gateway has acknowledged or its lease ended.
lease_revocation = sa.Table(
    "lease_revocation",
    metadata,
    ref("host_id", "host.id", primary_key=True),
    sa.Column("number", sa.BigInteger(), nullable=False),
    sa.Column("term", sa.BigInteger(), nullable=False),
    sa.Column("acknowledgements", Json, nullable=False),
    created_at(),
)

# Space that leases go on in when the disk of a PostgreSQL server is full; empty on SQLite. See `store/ballast_table.py`.
ballast = sa.Table(
    "ballast",
    metadata,
    sa.Column("position", sa.Integer(), primary_key=True),
    sa.Column("filler", sa.LargeBinary(), nullable=False),
)
