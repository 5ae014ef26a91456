"""One-use tokens with which a machine joins the fleet; only the hash of the secret is stored."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_controller.store.rows import build
from trimtab_protos.errors import NotFound

_table = schema.host_token


@dataclass(frozen=True, slots=True, kw_only=True)
class HostToken:
    """`host_id`: set where the token re-admits that host, and on a used token to the host that it admitted."""

    id: str
    name: str
    secret_sha256: str
    host_id: str | None
    expires_at: datetime
    used_at: datetime | None
    created_by: str
    created_at: datetime


def insert(
    session: Session,
    *,
    token_id: str,
    name: str,
    secret_sha256: str,
    host_id: str | None,
    expires_at: datetime,
    created_by: str,
    now: datetime,
) -> HostToken:
    session.execute(
        _table.insert().values(
            id=token_id,
            name=name,
            secret_sha256=secret_sha256,
            host_id=host_id,
            expires_at=expires_at,
            created_by=created_by,
            created_at=now,
        )
    )
    return get(session, token_id)


def get(session: Session, token_id: str) -> HostToken:
    row = session.execute(sa.select(_table).where(_table.c.id == token_id)).one_or_none()
    if row is None:
        raise NotFound("host-token-not-found", f"no host token {token_id}")
    return build(HostToken, row)


def find(session: Session, token_id: str) -> HostToken | None:
    row = session.execute(sa.select(_table).where(_table.c.id == token_id)).one_or_none()
    return build(HostToken, row) if row else None


def unused(session: Session, *, limit: int, now: datetime, after_id: str = "") -> tuple[HostToken, ...]:
    """Return up to `limit` tokens that can still be used, by id."""
    query = (
        sa.select(_table)
        .where(_table.c.used_at.is_(None), _table.c.expires_at > now, _table.c.id > after_id)
        .order_by(_table.c.id)
        .limit(limit)
    )
    return tuple(build(HostToken, row) for row in session.execute(query))


def use_up(session: Session, token_id: str, *, host_id: str, now: datetime) -> bool:
    """Mark the token used by the host; False where somebody was faster or it expired meanwhile."""
    changed = session.execute(
        _table.update()
        .where(_table.c.id == token_id, _table.c.used_at.is_(None), _table.c.expires_at > now)
        .values(used_at=now, host_id=host_id)
    )
    return getattr(changed, "rowcount", 0) == 1


def delete(session: Session, token_id: str) -> None:
    """Delete a token; NotFound where there is none."""
    changed = session.execute(_table.delete().where(_table.c.id == token_id))
    if getattr(changed, "rowcount", 0) != 1:
        raise NotFound("host-token-not-found", f"no host token {token_id}")


def delete_expired_before(session: Session, at: datetime, *, limit: int) -> int:
    """Delete up to `limit` tokens that expired before `at`; return how many."""
    old = sa.select(_table.c.id).where(_table.c.expires_at < at).limit(limit)
    changed = session.execute(_table.delete().where(_table.c.id.in_(old)))
    return int(getattr(changed, "rowcount", 0))
