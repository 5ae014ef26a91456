"""Operations, their journal, turns, slots, events and idempotency keys."""

import sqlalchemy as sa

from trimtab_controller.store.schema.base import BigInt, Json, UtcDateTime, created_at, id_column, metadata, ref

_LIVE = "state IN ('queued', 'running', 'waiting', 'compensating')"
_LOCKING = "is_exclusive AND state IN ('queued', 'running', 'waiting', 'compensating', 'needs_attention')"
_LOCKING_SQLITE = "is_exclusive = 1 AND state IN ('queued', 'running', 'waiting', 'compensating', 'needs_attention')"

operation = sa.Table(
    "operation",
    metadata,
    id_column(),
    sa.Column("kind", sa.String(40), nullable=False),  # name of the saga
    sa.Column("saga_version", sa.Integer(), nullable=False),
    # '' for operations on the fleet itself.
    sa.Column("project_id", sa.String(40), nullable=False),
    sa.Column("subject_id", sa.String(40), nullable=False),
    sa.Column("subject_name", sa.String(63), nullable=False),
    sa.Column("is_exclusive", sa.Boolean(), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("params", Json, nullable=False),
    sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
    # Drive: who holds it, until when, when it is due. `turn` is the subject's at the last claim.
    sa.Column("driver", sa.String(80), nullable=False, server_default=""),
    sa.Column("lease_until", UtcDateTime()),
    sa.Column("turn", sa.BigInteger(), nullable=False, server_default="0"),
    sa.Column("next_run", UtcDateTime(), nullable=False),
    # Consecutive tries of the present step without a record.
    sa.Column("attempts", sa.Integer(), nullable=False, server_default="0"),
    sa.Column("step", sa.String(40), nullable=False, server_default=""),
    sa.Column("is_cancel_requested", sa.Boolean(), nullable=False, server_default=sa.false()),
    sa.Column("deadline", UtcDateTime()),
    sa.Column("waiting_for", sa.String(200), nullable=False, server_default=""),
    sa.Column("progress", Json),
    sa.Column("error", Json),
    sa.Column("result", Json),
    sa.Column("actor", sa.String(80), nullable=False),
    sa.Column("request_id", sa.String(64), nullable=False),
    created_at(),
    sa.Column("updated_at", UtcDateTime(), nullable=False),
    sa.Column("ended_at", UtcDateTime()),
    sa.CheckConstraint(
        "state IN ('queued', 'running', 'waiting', 'compensating', 'done', 'failed', 'cancelled', 'needs_attention')",
        name="state",
    ),
)
# The only lock on a vm: at most one live exclusive operation.
sa.Index(
    "uq_operation_exclusive",
    operation.c.subject_id,
    unique=True,
    sqlite_where=sa.text(_LOCKING_SQLITE),
    postgresql_where=sa.text(_LOCKING),
)
# Plan of the claim query: range scan of due live rows in order.
sa.Index(
    "ix_operation_due",
    operation.c.next_run,
    sqlite_where=sa.text(_LIVE),
    postgresql_where=sa.text(_LIVE),
)
sa.Index("ix_operation_project", operation.c.project_id, operation.c.id)
sa.Index("ix_operation_subject", operation.c.subject_id, operation.c.id)
sa.Index("ix_operation_ended_at", operation.c.ended_at)

# Append-only. One row per recorded outcome of a step in a direction; names, not numbers, so that sagas may gain steps.
journal = sa.Table(
    "operation_journal",
    metadata,
    ref("operation_id", "operation.id", primary_key=True),
    sa.Column("position", sa.Integer(), primary_key=True),
    sa.Column("step", sa.String(40), nullable=False),
    sa.Column("direction", sa.String(8), nullable=False),  # do, undo
    sa.Column("outcome", sa.String(16), nullable=False),  # succeeded, failed
    sa.Column("turn", sa.BigInteger(), nullable=False),
    sa.Column("result", Json),
    sa.Column("error", Json),
    sa.Column("at", UtcDateTime(), nullable=False),
    # At most one of each: a step that failed may still be found to have taken place (see `saga.TookPlace`).
    sa.UniqueConstraint("operation_id", "step", "direction", "outcome"),
    sa.CheckConstraint("direction IN ('do', 'undo')", name="direction"),
    sa.CheckConstraint("outcome IN ('succeeded', 'failed')", name="outcome"),
)

# The turn of the driver of one subject's operations; outlives the subject, only grows.
turn = sa.Table(
    "turn",
    metadata,
    sa.Column("subject_id", sa.String(40), primary_key=True),
    sa.Column("value", sa.BigInteger(), nullable=False),
)

# A bounded right per host and class (migrate_out, migrate_in, import). Rows belong to operations, so a crash cannot leak them.
slot = sa.Table(
    "slot",
    metadata,
    sa.Column("host_id", sa.String(40), primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("number", sa.Integer(), primary_key=True),
    ref("operation_id", "operation.id"),
)
sa.Index("ix_slot_operation_id", slot.c.operation_id)

# What watchers read, in order of `seq`; also the outbox of nudges.
event = sa.Table(
    "event",
    metadata,
    sa.Column("seq", BigInt, primary_key=True, autoincrement=True),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("subject_id", sa.String(40), nullable=False),
    sa.Column("operation_id", sa.String(40), nullable=False, server_default=""),
    sa.Column("actor", sa.String(80), nullable=False, server_default=""),
    sa.Column("message", sa.String(500), nullable=False),
    sa.Column("context", Json, nullable=False),
)
sa.Index("ix_event_at", event.c.at)
sa.Index("ix_event_subject", event.c.subject_id, event.c.seq)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("actor", sa.String(80), primary_key=True),
    sa.Column("request_id", sa.String(64), primary_key=True),
    # SHA-256 of route and body: the same id with another request is a conflict, not a replay.
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("status", sa.Integer(), nullable=False),
    sa.Column("response", Json, nullable=False),
    created_at(),
)
sa.Index("ix_idempotency_created_at", idempotency.c.created_at)
