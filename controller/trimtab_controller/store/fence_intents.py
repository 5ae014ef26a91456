"""Fence intents in SQL: what was written in which host's slot, for people and for the audit. Nothing is decided by them."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.beacon_slots import Intent

_table = schema.fence_intent


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceIntentRow:
    """The newest intent against a host."""

    host_id: str
    term: int
    number: int
    lease_number: int
    pool_id: str
    via_host_id: str
    """Whose agent was asked to write it."""
    begun_at: datetime
    written_at: datetime | None
    """When it was durable; None: it is under way, or it failed."""


def begin(session: Session, host_id: str, intent: Intent, pool_id: str, *, via_host_id: str, now: datetime) -> None:
    """Record that an intent is about to be written."""
    values = {
        "term": intent.term,
        "number": intent.number,
        "lease_number": intent.lease_number,
        "pool_id": pool_id,
        "via_host_id": via_host_id,
        "begun_at": now,
        "written_at": None,
    }
    changed = session.execute(_table.update().where(_table.c.host_id == host_id).values(**values))
    if getattr(changed, "rowcount", 0) == 0:
        session.execute(_table.insert().values(host_id=host_id, **values))


def written(session: Session, host_id: str, intent: Intent, *, now: datetime) -> None:
    """Record that this very intent is durable."""
    is_same = (_table.c.host_id == host_id, _table.c.term == intent.term, _table.c.number == intent.number)
    session.execute(_table.update().where(*is_same).values(written_at=now))


def forget(session: Session, host_id: str) -> None:
    """The host came back: its intent forbids only leases that it has no more."""
    session.execute(_table.delete().where(_table.c.host_id == host_id))


def find(session: Session, host_id: str) -> FenceIntentRow | None:
    row = session.execute(sa.select(*columns_of(_table, FenceIntentRow)).where(_table.c.host_id == host_id)).first()
    return build(FenceIntentRow, row) if row else None
