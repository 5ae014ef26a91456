"""Networks, how each host reaches them, nics and addresses."""

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

network = sa.Table(
    "network",
    metadata,
    id_column(),
    # '' is shared by every project.
    sa.Column("project_id", sa.String(40), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    # Bridge on hosts that have no mapping of their own.
    sa.Column("bridge", sa.String(15), nullable=False, server_default=""),
    sa.Column("vlan", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("mtu", sa.Integer(), nullable=False, server_default="1500"),
    sa.Column("subnet", sa.String(50), nullable=False, server_default=""),
    sa.Column("has_dhcp", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("settings", Json, nullable=False),
    version(),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("kind IN ('bridge', 'vlan', 'nat', 'isolated', 'overlay')", name="kind"),
    sa.CheckConstraint("vlan BETWEEN 0 AND 4094", name="vlan"),
    sa.CheckConstraint("mtu BETWEEN 576 AND 65535", name="mtu"),
)
unique_among_live("uq_network_name_live", network.c.project_id, network.c.name)

network_host = sa.Table(
    "network_host",
    metadata,
    ref("network_id", "network.id", primary_key=True),
    ref("host_id", "host.id", primary_key=True),
    sa.Column("bridge", sa.String(15), nullable=False, server_default=""),
    sa.Column("state", sa.String(16), nullable=False),  # unknown, ready, failed
    sa.Column("problem", sa.String(500), nullable=False, server_default=""),
    sa.Column("observed_at", UtcDateTime()),
    sa.CheckConstraint("state IN ('unknown', 'ready', 'failed')", name="state"),
)

nic = sa.Table(
    "nic",
    metadata,
    id_column(),
    ref("vm_id", "vm.id"),
    ref("network_id", "network.id"),
    sa.Column("nic_index", sa.Integer(), nullable=False),
    sa.Column("mac", sa.String(17), nullable=False, unique=True),
    sa.Column("model", sa.String(16), nullable=False, server_default="virtio"),
    # The guest may send as others, as a router does.
    sa.Column("allows_spoofing", sa.Boolean(), nullable=False, server_default=sa.false()),
    created_at(),
    sa.UniqueConstraint("vm_id", "nic_index"),
)
sa.Index("ix_nic_network_id", nic.c.network_id)

# Declared addresses; the key makes a duplicate on one network impossible.
nic_address = sa.Table(
    "nic_address",
    metadata,
    ref("network_id", "network.id", primary_key=True),
    sa.Column("address", sa.String(45), primary_key=True),
    sa.Column("prefix_length", sa.Integer(), nullable=False),
    ref("nic_id", "nic.id"),
)
sa.Index("ix_nic_address_nic_id", nic_address.c.nic_id)

# MACs of domains that are not ours, as last reported; ours must not collide with them.
unmanaged_mac = sa.Table(
    "unmanaged_mac",
    metadata,
    ref("host_id", "host.id", primary_key=True),
    sa.Column("mac", sa.String(17), primary_key=True),
)
sa.Index("ix_unmanaged_mac_mac", unmanaged_mac.c.mac)

# Who may reach a vm. rules: as `core.firewall` writes them.
secgroup = sa.Table(
    "secgroup",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("rules", Json, nullable=False),
    version(),
    created_at(),
    deleted_at(),
)
unique_among_live("uq_secgroup_name_live", secgroup.c.project_id, secgroup.c.name)

secgroup_member = sa.Table(
    "secgroup_member",
    metadata,
    ref("secgroup_id", "secgroup.id", primary_key=True),
    ref("vm_id", "vm.id", primary_key=True),
)
sa.Index("ix_secgroup_member_vm_id", secgroup_member.c.vm_id)

# Of a vm that was ever in a group. The generation grows with each change of its groups, in the same transaction; hosts keep the highest.
vm_firewall = sa.Table(
    "vm_firewall",
    metadata,
    ref("vm_id", "vm.id", primary_key=True),
    sa.Column("generation", sa.BigInteger(), nullable=False),
    # What its host has said that it is under.
    sa.Column("applied_generation", sa.BigInteger(), nullable=False, server_default="0"),
    sa.CheckConstraint("applied_generation <= generation", name="applied"),
)
