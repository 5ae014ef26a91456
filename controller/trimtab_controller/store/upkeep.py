"""What the leader's upkeep reads and deletes."""

import hashlib
import json
from datetime import datetime
from itertools import takewhile

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Vm
from trimtab_controller.store import schema, vms
from trimtab_controller.store.rows import columns_of


def vms_to_purge(session: Session, now: datetime, *, limit: int) -> tuple[Vm, ...]:
    table = schema.vm
    query = sa.select(*columns_of(table, Vm)).where(table.c.purge_after <= now, table.c.purged_at.is_(None)).limit(limit)
    return tuple(vms.from_row(row) for row in session.execute(query))


def delete_audit_before(session: Session, at: datetime, *, limit: int) -> None:
    """Delete the oldest sealed rows, up to the first that is to stay: one that is taken from among others would look like tampering.

    The chain goes on from the newest seal that is left.
    """
    table = schema.audit
    sealed = sa.select(table.c.seq, table.c.at).where(table.c.chain_sha256.is_not(None)).order_by(table.c.seq).limit(limit)
    old = [row.seq for row in takewhile(lambda row: row.at < at, session.execute(sealed).all())]
    if old:
        session.execute(table.delete().where(table.c.seq <= old[-1], table.c.chain_sha256.is_not(None)))


def delete_idempotency_before(session: Session, at: datetime, *, limit: int) -> None:
    table = schema.idempotency
    old = session.execute(sa.select(table.c.actor, table.c.request_id).where(table.c.created_at < at).limit(limit)).all()
    for row in old:
        session.execute(table.delete().where(table.c.actor == row.actor, table.c.request_id == row.request_id))


def seal_audit(session: Session, *, before: datetime, limit: int) -> int:
    """Chain up to `limit` unsealed rows, oldest first: SHA-256 over the seal before and the row's content.

    `before`: the first younger one waits, with all after it. A row's number is drawn before it is committed, so that one with a smaller
    number may still come; and clocks of two writers differ, so that a greater number may look older.
    """
    table = schema.audit
    newest = sa.select(table.c.chain_sha256).where(table.c.chain_sha256.is_not(None)).order_by(table.c.seq.desc()).limit(1)
    seal = session.execute(newest).scalar_one_or_none() or ""
    rows = session.execute(sa.select(table).where(table.c.chain_sha256.is_(None)).order_by(table.c.seq).limit(limit)).all()
    old = list(takewhile(lambda row: row.at < before, rows))
    for row in old:
        seal = chain(seal, row)
        session.execute(table.update().where(table.c.seq == row.seq).values(chain_sha256=seal))
    return len(old)


def verify_audit(session: Session, *, page: int = 10_000) -> int | None:
    """Return the seq of the first sealed row whose seal does not fit, None where the chain is whole. Reads `page` rows at a time."""
    table = schema.audit
    sealed = sa.select(table).where(table.c.chain_sha256.is_not(None)).order_by(table.c.seq).limit(page)
    seal: str | None = None
    rows = session.execute(sealed).all()
    while rows:
        for row in rows:
            if seal is not None and chain(seal, row) != row.chain_sha256:
                return int(row.seq)
            seal = row.chain_sha256
        rows = session.execute(sealed.where(table.c.seq > rows[-1].seq)).all()
    return None


def chain(seal: str, row: sa.Row[tuple[object, ...]]) -> str:
    fields = ("seq", "at", "actor", "request_id", "project_id", "verb", "resource", "outcome", "cause", "context")
    mapping = row._mapping
    content = [mapping[name].isoformat() if name == "at" else mapping[name] for name in fields]
    return hashlib.sha256((seal + json.dumps(content, sort_keys=True)).encode()).hexdigest()
