"""Power devices of hosts, what failover did and why, and what operators told it."""

import sqlalchemy as sa

from trimtab_controller.store.schema.base import Json, UtcDateTime, created_at, id_column, metadata, ref

# Power devices of a host, tried in order of `position`. `secret` is encrypted with a key that only controllers have as a file.
fence_path = sa.Table(
    "fence_path",
    metadata,
    ref("host_id", "host.id", primary_key=True),
    sa.Column("position", sa.Integer(), primary_key=True),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("agent", sa.String(63), nullable=False),
    sa.Column("options", Json, nullable=False),
    sa.Column("secret_file", sa.String(400), nullable=False, server_default=""),
    sa.Column("secret", sa.String(2000), nullable=False, server_default=""),
    # Somebody asked for a test since then; the leader's next round makes it.
    sa.Column("test_wanted_at", UtcDateTime()),
    sa.Column("tested_at", UtcDateTime()),
    sa.Column("test_power", sa.String(16), nullable=False, server_default=""),
    sa.Column("test_message", sa.String(400), nullable=False, server_default=""),
    created_at(),
)

# What the host's lease may be counted on for: of every renewal that was granted since, at least this much was true. A gateway that
# hears less (not armed, slower kills, another beacon) has it recorded before it grants again.
host_guard = sa.Table(
    "host_guard",
    metadata,
    ref("host_id", "host.id", primary_key=True),
    sa.Column("is_armed", sa.Boolean(), nullable=False),
    sa.Column("kill_ms", sa.Integer(), nullable=False),
    # The shared pool in which the host renews its lease as well; '': in none.
    sa.Column("beacon_pool_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
    sa.CheckConstraint("kill_ms >= 0", name="kill_ms"),
)

# The newest fence intent against a silent host that renews on shared storage; gone once the host is back.
fence_intent = sa.Table(
    "fence_intent",
    metadata,
    ref("host_id", "host.id", primary_key=True),
    sa.Column("term", sa.BigInteger(), nullable=False),
    sa.Column("number", sa.BigInteger(), nullable=False),
    sa.Column("lease_number", sa.BigInteger(), nullable=False),
    sa.Column("pool_id", sa.String(40), nullable=False),
    sa.Column("via_host_id", sa.String(40), nullable=False),
    sa.Column("begun_at", UtcDateTime(), nullable=False),
    sa.Column("written_at", UtcDateTime()),
)

# A cut of a host's power that an operator asked for; the leader removes it before it carries it out.
power_cut = sa.Table(
    "power_cut",
    metadata,
    ref("host_id", "host.id", primary_key=True),
    sa.Column("asked_by", sa.String(128), nullable=False),
    sa.Column("asked_at", UtcDateTime(), nullable=False),
)

# One loss of one host, from lost to its return: the timeline is its evidence, in order.
failover = sa.Table(
    "failover",
    metadata,
    id_column(),
    ref("host_id", "host.id"),
    sa.Column("state", sa.String(16), nullable=False),  # lost, fenced, returned
    sa.Column("proof", sa.String(16), nullable=False, server_default=""),
    sa.Column("evidence", Json, nullable=False),
    sa.Column("fenced_at", UtcDateTime()),
    sa.Column("returned_at", UtcDateTime()),
    created_at(),
    sa.CheckConstraint("state IN ('lost', 'fenced', 'returned')", name="state"),
    sa.CheckConstraint("state <> 'fenced' OR proof <> ''", name="proof"),
)
_open = sa.text("state <> 'returned'")
sa.Index("uq_failover_host_open", failover.c.host_id, unique=True, sqlite_where=_open, postgresql_where=_open)

failover_vm = sa.Table(
    "failover_vm",
    metadata,
    ref("failover_id", "failover.id", primary_key=True),
    ref("vm_id", "vm.id", primary_key=True),
    sa.Column("operation_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("state", sa.String(16), nullable=False),  # waiting, starting, running, failed
    sa.Column("why", sa.String(1000), nullable=False, server_default=""),
    created_at(),
    sa.Column("ended_at", UtcDateTime()),
    sa.CheckConstraint("state IN ('waiting', 'starting', 'running', 'failed')", name="state"),
)

# One row, `failover`: what operators said and why it stands still.
failover_control = sa.Table(
    "failover_control",
    metadata,
    sa.Column("name", sa.String(16), primary_key=True),
    sa.Column("is_paused", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("frozen", sa.String(500), nullable=False, server_default=""),
    # host -> {by, reason}: recover it although failover is frozen; confirmed off by an operator.
    sa.Column("released", Json, nullable=False),
    sa.Column("confirmed_off", Json, nullable=False),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
)
