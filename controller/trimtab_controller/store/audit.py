"""The audit trail: who asked for what, and what came of it. Append-only; the leader seals it into a hash chain in batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import keyset, schema
from trimtab_controller.store.rows import build

_table = schema.audit
_INSERT = _table.insert()


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    seq: int
    at: datetime
    actor: str
    request_id: str
    project_id: str
    verb: str
    resource: str
    # accepted, denied or failed.
    outcome: str
    # The error's code where it was not accepted.
    cause: str
    context: Mapping[str, Any]
    # Set once sealed.
    chain_sha256: str | None


def append(
    session: Session,
    *,
    at: datetime,
    actor: str,
    request_id: str,
    project_id: str,
    verb: str,
    resource: str,
    outcome: str,
    cause: str = "",
    context: Mapping[str, Any] | None = None,
) -> None:
    """Append one record; everything is cut to its column, nothing of it may be a secret."""
    values = {
        "at": at,
        "actor": actor[:80],
        "request_id": request_id[:64],
        "project_id": project_id,
        "verb": verb[:80],
        "resource": resource[:200],
        "outcome": outcome,
        "cause": cause[:200],
        "context": dict(context or {}),
    }
    session.execute(_INSERT, values)


FILTERS: keyset.Filters = {
    "actor": keyset.equals(_table.c.actor),
    "verb": keyset.equals(_table.c.verb),
    "resource": keyset.equals(_table.c.resource),
    "outcome": keyset.equals(_table.c.outcome),
    "project": keyset.named(_table.c.project_id, schema.project),
    "request_id": keyset.equals(_table.c.request_id),
}


def page(
    session: Session,
    *,
    limit: int,
    before_seq: int | None,
    filters: Mapping[str, str],
    since: datetime | None = None,
    until: datetime | None = None,
) -> tuple[AuditRecord, ...]:
    """Return up to `limit` records, newest first, below `before_seq`."""
    query = sa.select(_table).order_by(_table.c.seq.desc()).limit(limit)
    query = query.where(*keyset.conditions(_table, keyset.Page(filters=filters), FILTERS))
    if before_seq is not None:
        query = query.where(_table.c.seq < before_seq)
    if since is not None:
        query = query.where(_table.c.at >= since)
    if until is not None:
        query = query.where(_table.c.at < until)
    return tuple(build(AuditRecord, row) for row in session.execute(query))
