"""Answers of mutations by the caller's request id, so that a repeat is answered and not done again."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_controller.store.inserts import insert_unless_taken
from trimtab_controller.store.rows import build

_table = schema.idempotency
_WRITE = _table.update().where(_table.c.actor == sa.bindparam("of_actor"), _table.c.request_id == sa.bindparam("of_request"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer:
    fingerprint: str
    status: int
    response: Any


def claim(session: Session, *, actor: str, request_id: str, fingerprint: str, now: datetime) -> StoredAnswer | None:
    """Take the request id for this transaction, or return what it was answered with.

    The row comes first and is filled by `answer`, so that a repeat at the same moment waits for the first one's end (PostgreSQL;
    SQLite has one writer) and then finds its answer, or its turn.
    """
    values = {"actor": actor, "request_id": request_id, "fingerprint": fingerprint, "status": 0, "response": None}
    if insert_unless_taken(session, _table, {**values, "created_at": now}) is not None:
        return None
    query = sa.select(_table).where(_table.c.actor == actor, _table.c.request_id == request_id)
    return build(StoredAnswer, session.execute(query).one())


def answer(session: Session, *, actor: str, request_id: str, status: int, response: Any) -> None:
    """Keep the answer, in the transaction that did the work."""
    session.execute(_WRITE, {"of_actor": actor, "of_request": request_id, "status": status, "response": response})
