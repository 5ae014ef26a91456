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


class Raced(Exception):
    """Another request of the same id committed first: run the transaction again, it will find the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer:
    fingerprint: str
    status: int
    response: Any


def find(session: Session, *, actor: str, request_id: str) -> StoredAnswer | None:
    query = sa.select(_table).where(_table.c.actor == actor, _table.c.request_id == request_id)
    row = session.execute(query).one_or_none()
    return build(StoredAnswer, row) if row else None


def record(session: Session, *, actor: str, request_id: str, fingerprint: str, status: int, response: Any, now: datetime) -> None:
    """Keep the answer, in the transaction that did the work. Raced where the same id was answered meanwhile."""
    values = {"actor": actor, "request_id": request_id, "fingerprint": fingerprint, "status": status, "response": response}
    if insert_unless_taken(session, _table, {**values, "created_at": now}) is None:
        raise Raced(request_id)
