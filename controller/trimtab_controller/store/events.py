"""Events: what watchers see, in order. Appended in the transaction of the change they tell of."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Event
from trimtab_controller.store import schema
from trimtab_controller.store.among import among
from trimtab_controller.store.rows import build

_INSERT = schema.event.insert()


def append(
    session: Session,
    *,
    kind: str,
    subject_id: str,
    message: str,
    now: datetime,
    project_id: str = "",
    operation_id: str = "",
    actor: str = "",
    context: Mapping[str, Any] | None = None,
) -> None:
    """Append one event; `context` is bounded, for programs, without secrets."""
    values = {
        "at": now,
        "kind": kind,
        "project_id": project_id,
        "subject_id": subject_id,
        "operation_id": operation_id,
        "actor": actor,
        "message": message[:500],
        "context": dict(context or {}),
    }
    session.execute(_INSERT, values)


def page_after(
    session: Session,
    seq: int,
    *,
    limit: int,
    until: int | None = None,
    project_ids: Sequence[str] | None = None,
    subject_id: str = "",
    kind_prefix: str = "",
) -> tuple[Event, ...]:
    """Return up to `limit` events after `seq`, oldest first, of these projects (None: all).

    Who reads on from the last of them gives as `until` a number up to which none can appear any more (`event_horizon`).
    """
    query = sa.select(schema.event).where(schema.event.c.seq > seq).order_by(schema.event.c.seq).limit(limit)
    if until is not None:
        query = query.where(schema.event.c.seq <= until)
    if project_ids is not None:
        query = query.where(schema.event.c.project_id.in_(project_ids))
    if subject_id:
        query = query.where(schema.event.c.subject_id == subject_id)
    if kind_prefix:
        query = query.where(schema.event.c.kind.startswith(kind_prefix, autoescape=True))
    return tuple(build(Event, row) for row in session.execute(query))


def of_kinds(session: Session, kinds: Collection[str], subject_ids: Collection[str]) -> tuple[Event, ...]:
    """Return the events of these kinds about these subjects, oldest first. Plan: ix_event_subject."""
    table = schema.event
    query = sa.select(table).where(among(table.c.subject_id, sorted(subject_ids)), table.c.kind.in_(kinds)).order_by(table.c.seq)
    return tuple(build(Event, row) for row in session.execute(query))


def bounds(session: Session) -> tuple[int, int]:
    """Return (oldest seq kept, newest seq); (0, 0) when there is none."""
    row = session.execute(sa.select(sa.func.min(schema.event.c.seq), sa.func.max(schema.event.c.seq))).one()
    return int(row[0] or 0), int(row[1] or 0)


def newest(session: Session) -> int:
    """Return the number of the newest event that is to be seen, 0 when there is none. Plan: the primary key's last entry."""
    return int(session.scalar(sa.select(sa.func.max(schema.event.c.seq))) or 0)


def delete_before(session: Session, at: datetime, *, limit: int) -> int:
    """Delete up to `limit` events older than `at`; return how many."""
    old = sa.select(schema.event.c.seq).where(schema.event.c.at < at).order_by(schema.event.c.seq).limit(limit)
    result = session.execute(schema.event.delete().where(schema.event.c.seq.in_(old)))
    return int(getattr(result, "rowcount", 0))
