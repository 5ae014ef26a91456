"""Overlay networks beyond the networks themselves: routers, floating addresses, and how far OVN's database has followed."""

import sqlalchemy as sa

from trimtab_controller.store.schema.base import (
    UtcDateTime,
    created_at,
    deleted_at,
    id_column,
    metadata,
    ref,
    unique_among_live,
    version,
)

# Overlay networks of the project name it (`settings.router`); networks of several projects never meet at one.
router = sa.Table(
    "router",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    sa.Column("name", sa.String(63), nullable=False),
    # Its outer side, and its address there: both or neither.
    ref("outer_network_id", "network.id", nullable=True),
    sa.Column("outer_address", sa.String(45)),
    version(),
    created_at(),
    deleted_at(),
    sa.CheckConstraint("(outer_network_id IS NULL) = (outer_address IS NULL)", name="outer_side"),
)
unique_among_live("uq_router_name_live", router.c.project_id, router.c.name)
unique_among_live("uq_router_outer_address_live", router.c.outer_network_id, router.c.outer_address)

# `name` is the address. That no router has it too is seen to under the network's lock (`networks.lock`).
floating = sa.Table(
    "floating",
    metadata,
    id_column(),
    ref("project_id", "project.id"),
    ref("network_id", "network.id"),
    sa.Column("name", sa.String(63), nullable=False),
    # Whom it leads to; goes with the card, stays with a vm that is deleted and not purged.
    ref("nic_id", "nic.id", nullable=True),
    version(),
    created_at(),
    deleted_at(),
)
unique_among_live("uq_floating_name_live", floating.c.network_id, floating.c.name)
sa.Index("uq_floating_nic_id", floating.c.nic_id, unique=True)

# One row. `asked` is raised by who waits until OVN's database is as SQL was then, `answered` follows; the rest is of the last round.
overlay_state = sa.Table(
    "overlay_state",
    metadata,
    sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
    sa.Column("is_up", sa.Boolean(), nullable=False, server_default=sa.true()),
    sa.Column("problem", sa.String(500), nullable=False, server_default=""),
    sa.Column("since", UtcDateTime()),
    sa.Column("asked", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("answered", sa.BigInteger(), nullable=False, server_default="0"),
    sa.CheckConstraint("id = 1", name="one"),
    sa.CheckConstraint("answered <= asked", name="answered"),
)
