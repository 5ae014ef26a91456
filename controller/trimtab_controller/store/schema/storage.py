"""Pools, images and their replicas, volumes, uploads."""

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

# `host_id` in this file: '' where the thing lives on a shared pool, else the host that has it.
SHARED = ""

pool = sa.Table(
    "pool",
    metadata,
    id_column(),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("path", sa.String(500), nullable=False),
    sa.Column("is_shared", sa.Boolean(), nullable=False),
    # A shared pool takes volumes only after each of its hosts has read a marker that another wrote.
    sa.Column("sharing_proven_at", UtcDateTime()),
    sa.Column("reserve_permille", sa.Integer(), nullable=False, server_default="50"),
    sa.Column("settings", Json, nullable=False),
    version(),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("kind IN ('dir', 'nfs', 'iscsi', 'lvm_thin', 'rbd')", name="kind"),
)
unique_among_live("uq_pool_name_live", pool.c.name)

pool_host = sa.Table(
    "pool_host",
    metadata,
    ref("pool_id", "pool.id", primary_key=True),
    ref("host_id", "host.id", primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),  # unknown, ready, failed, unresponsive
    sa.Column("problem", sa.String(500), nullable=False, server_default=""),
    sa.Column("observed_at", UtcDateTime()),
    sa.CheckConstraint("state IN ('unknown', 'ready', 'failed', 'unresponsive')", name="state"),
)

# Space is claimed per place: one row for a shared pool, one per host for a local one.
pool_space = sa.Table(
    "pool_space",
    metadata,
    ref("pool_id", "pool.id", primary_key=True),
    sa.Column("host_id", sa.String(40), primary_key=True),
    sa.Column("capacity_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("available_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    # Full virtual size of what is placed here; sparse files use less, which is the margin until a later issue trades it.
    sa.Column("claimed_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("observed_at", UtcDateTime()),
    # What its volumes have allocated of their sizes; NULL where the hosts cannot tell it from what others wrote.
    sa.Column("written_bytes", sa.BigInteger()),
    sa.CheckConstraint("claimed_bytes >= 0", name="claimed_not_negative"),
)

# What hosts show to the storage of a pool, sealed like the keys of volumes.
pool_secret = sa.Table(
    "pool_secret",
    metadata,
    ref("pool_id", "pool.id", primary_key=True),
    sa.Column("sealed_secret", sa.String(500), nullable=False),
    created_at(),
)

image = sa.Table(
    "image",
    metadata,
    id_column(),
    # '' is offered to every project.
    sa.Column("project_id", sa.String(40), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),  # disk, iso
    sa.Column("format", sa.String(16), nullable=False),
    sa.Column("virtual_size_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("file_size_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("source_sha256", sa.String(64), nullable=False, server_default=""),
    sa.Column("stored_sha256", sa.String(64), nullable=False, server_default=""),
    sa.Column("state", sa.String(16), nullable=False),  # importing, ready, failed
    sa.Column("labels", Json, nullable=False),
    version(),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("state IN ('importing', 'ready', 'failed')", name="state"),
)
unique_among_live("uq_image_name_live", image.c.project_id, image.c.name)

image_replica = sa.Table(
    "image_replica",
    metadata,
    ref("image_id", "image.id", primary_key=True),
    ref("pool_id", "pool.id", primary_key=True),
    sa.Column("host_id", sa.String(40), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),  # copying, ready, deleting
    # The operation that distributes it; while it lives nobody else cleans up.
    sa.Column("owner_operation_id", sa.String(40), nullable=False, server_default=""),
    created_at(),
    sa.CheckConstraint("state IN ('copying', 'ready', 'deleting')", name="state"),
)

volume = sa.Table(
    "volume",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    sa.Column("name", sa.String(63), nullable=False),
    ref("pool_id", "pool.id"),
    # Where its bytes are; '' on a shared pool or not yet made.
    sa.Column("host_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("format", sa.String(16), nullable=False),
    sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    sa.Column("base_image_id", sa.String(40), sa.ForeignKey("image.id")),
    # What the bottom layer of a linked clone lies over.
    sa.Column("parent_volume_id", sa.String(40), sa.ForeignKey("volume.id")),
    sa.Column("parent_layer_id", sa.String(40), nullable=False, server_default=""),
    # The layer that its vm writes to ('': the bottom one), and while that is being merged the one that it goes into.
    sa.Column("layer_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("merge_layer_id", sa.String(40)),
    # Of a volume that moves between pools: its other place, and whether it is `going` there or has `left` it ('': it does not move).
    sa.Column("other_pool_id", sa.String(40)),
    sa.Column("other_host_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("other_format", sa.String(16), nullable=False, server_default=""),
    sa.Column("move_state", sa.String(16), nullable=False, server_default=""),
    # Grows when content goes back in time (revert, restore) or into another file (move): old checkpoints and bitmaps die with it.
    sa.Column("generation", sa.BigInteger(), nullable=False, server_default="1"),
    # While it still reads from a backup: which, and which disk of it.
    sa.Column("fill_backup_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("fill_disk", sa.String(8), nullable=False, server_default=""),
    # Its bytes lie encrypted, under the key in `volume_key`.
    sa.Column("is_encrypted", sa.Boolean(), nullable=False, server_default=sa.false()),
    # Of a pool whose volumes have numbers (iSCSI): its LUN; '' for none.
    sa.Column("unit", sa.String(16), nullable=False, server_default=""),
    # absent until the agent proved it.
    sa.Column("observed_state", sa.String(16), nullable=False, server_default="absent"),
    sa.Column("allocated_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    # How fast a guest may use it; 0: as fast as the pool.
    sa.Column("iops_limit", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("bandwidth_limit_mib_s", sa.Integer(), nullable=False, server_default="0"),
    # Attachment.
    sa.Column("vm_id", sa.String(40), sa.ForeignKey("vm.id")),
    sa.Column("disk_index", sa.Integer()),
    sa.Column("bus", sa.String(16), nullable=False, server_default="virtio"),
    sa.Column("boot_order", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("is_read_only", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("is_deleted_with_vm", sa.Boolean(), nullable=False, server_default=sa.true()),
    version(),
    created_at(),
    deleted_at(),
    # Its bytes are removed after this instant; until then `undelete` brings a volume that was apart back.
    sa.Column("purge_after", UtcDateTime()),
    sa.CheckConstraint("format IN ('raw', 'qcow2')", name="format"),
    sa.CheckConstraint("size_bytes > 0", name="size"),
    sa.CheckConstraint("observed_state IN ('absent', 'present', 'unknown')", name="observed_state"),
)
unique_among_live("uq_volume_name_live", volume.c.project_id, volume.c.name)
sa.Index("uq_volume_vm_disk", volume.c.vm_id, volume.c.disk_index, unique=True)
sa.Index("ix_volume_base_image_id", volume.c.base_image_id)

sa.Index("ix_volume_parent_volume_id", volume.c.parent_volume_id)
sa.Index("ix_volume_other_pool_id", volume.c.other_pool_id)

# Two volumes of one pool would write over each other; a tombstone has given its number back.
sa.Index(
    "uq_volume_unit",
    volume.c.pool_id,
    volume.c.unit,
    unique=True,
    sqlite_where=volume.c.unit != "",
    postgresql_where=volume.c.unit != "",
)

# Keys apart from volumes, whose rows are read everywhere: sealed by the controllers' own key, of no use to who reads the database.
volume_key = sa.Table(
    "volume_key",
    metadata,
    ref("volume_id", "volume.id", primary_key=True),
    sa.Column("sealed_key", sa.String(200), nullable=False),
    created_at(),
)

# The layers of a volume over its bottom one, each with what it lies over ('': the bottom one).
volume_layer = sa.Table(
    "volume_layer",
    metadata,
    id_column(),
    ref("volume_id", "volume.id"),
    sa.Column("parent_layer_id", sa.String(40), nullable=False, server_default=""),
    created_at(),
)
sa.Index("ix_volume_layer_volume_id", volume_layer.c.volume_id)

upload = sa.Table(
    "upload",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    # The replica of the controller that has the bytes: its gateway's address.
    sa.Column("gateway_address", sa.String(200), nullable=False),
    sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False, server_default=""),
    sa.Column("expires_at", UtcDateTime(), nullable=False),
    created_at(),
)
