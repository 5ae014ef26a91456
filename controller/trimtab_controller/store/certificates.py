"""Serials of every certificate that the fleet's CA gave to hosts: what is in force, until when, and what was revoked."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_controller.store.rows import build

_table = schema.host_certificate


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCertificate:
    serial: str
    host_id: str
    purpose: str
    not_after: datetime
    revoked_at: datetime | None
    created_at: datetime


def record(session: Session, *, serial: str, host_id: str, purpose: str, not_after: datetime, now: datetime) -> None:
    """Record a certificate before it is handed out: one that is not here is refused."""
    session.execute(_table.insert().values(serial=serial, host_id=host_id, purpose=purpose, not_after=not_after, created_at=now))


def get(session: Session, serial: str) -> HostCertificate | None:
    row = session.execute(sa.select(_table).where(_table.c.serial == serial)).one_or_none()
    return build(HostCertificate, row) if row else None


def latest_of(session: Session, host_ids: Sequence[str]) -> dict[str, dict[str, HostCertificate]]:
    """Return each host's newest unrevoked certificate per purpose."""
    query = (
        sa.select(_table)
        .where(_table.c.host_id.in_(host_ids), _table.c.revoked_at.is_(None))
        .order_by(_table.c.created_at, _table.c.not_after)
    )
    found: dict[str, dict[str, HostCertificate]] = {host_id: {} for host_id in host_ids}
    for row in session.execute(query):
        found[row.host_id][row.purpose] = build(HostCertificate, row)
    return found


def in_force(session: Session, now: datetime) -> tuple[HostCertificate, ...]:
    """Return the newest certificate per live host and purpose that has not expired; what a CA rotation has to wait for."""
    host = schema.host
    query = (
        sa.select(_table)
        .join(host, host.c.id == _table.c.host_id)
        .where(host.c.deleted_at.is_(None), _table.c.revoked_at.is_(None), _table.c.not_after > now)
        .order_by(_table.c.created_at, _table.c.not_after)
    )
    newest = {(row.host_id, row.purpose): row for row in session.execute(query)}
    return tuple(build(HostCertificate, row) for row in newest.values())


def revoke_all_of(session: Session, host_id: str, *, now: datetime) -> int:
    """Revoke every certificate of the host; gateways end its session within seconds. Returns how many were in force."""
    changed = session.execute(
        _table.update().where(_table.c.host_id == host_id, _table.c.revoked_at.is_(None)).values(revoked_at=now)
    )
    return int(getattr(changed, "rowcount", 0))


def revoke(session: Session, serial: str, *, now: datetime) -> bool:
    """Revoke one certificate; False where it is unknown or revoked already."""
    changed = session.execute(
        _table.update().where(_table.c.serial == serial, _table.c.revoked_at.is_(None)).values(revoked_at=now)
    )
    return getattr(changed, "rowcount", 0) == 1


def revoked_serials(session: Session, now: datetime) -> frozenset[str]:
    """Return the revoked serials whose certificates have not expired anyway."""
    query = sa.select(_table.c.serial).where(_table.c.revoked_at.is_not(None), _table.c.not_after > now)
    return frozenset(session.scalars(query))


def delete_expired_before(session: Session, at: datetime, *, limit: int) -> int:
    """Delete up to `limit` records of certificates that expired before `at`; return how many.

    Keep `at` well in the past: a lapsed host proves itself with its last certificate, however old, when it rejoins.
    """
    old = sa.select(_table.c.serial).where(_table.c.not_after < at).limit(limit)
    changed = session.execute(_table.delete().where(_table.c.serial.in_(old)))
    return int(getattr(changed, "rowcount", 0))
