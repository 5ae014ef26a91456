"""Lease rows: who leads (`engine`), which gateways may grant (`gateway/<id>`), and the revocations that end all granting.

A row is held at a `term` and kept alive by raising its `beat`. No clock of another machine is ever compared: a contender steals
only after it has itself seen (term, beat) unchanged for the row's ttl, on its own CLOCK_BOOTTIME (`BeatWatch`). The holder stops
before that by its own clock (`loops/leader.py`, `rpc/granting.py`); in between, `assert_leader` refuses inside each transaction.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trimtab_controller.store import behind, schema
from trimtab_controller.store.behind import IS_BEHIND
from trimtab_controller.store.rows import build
from trimtab_protos.errors import Conflict

ENGINE = "engine"
GATEWAY_PREFIX = "gateway/"
_table = schema.lease

_LEADERS_TERM = (
    sa.select(_table.c.term, IS_BEHIND.label("is_behind"))
    .where(_table.c.name == ENGINE, _table.c.owner != "")
    .with_for_update(read=True, of=_table)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One row. `owner` is '' after a clean release; `renewed_at` is for people, never for decisions."""

    name: str
    owner: str
    term: int
    beat: int
    ttl_ms: int
    context: Mapping[str, Any]
    renewed_at: datetime


@dataclass(slots=True)
class BeatWatch:
    """How long this process itself has seen each lease row unchanged."""

    _seen: dict[str, tuple[int, int, float]] = field(default_factory=dict)

    def look(self, rows: Iterable[Lease], boottime_s: float) -> None:
        """Take notice of the rows: what is asked of them later counts from now."""
        for lease in rows:
            self.unchanged_for_s(lease, boottime_s)

    def unchanged_for_s(self, lease: Lease, boottime_s: float) -> float:
        """Return for how long (term, beat) has been the same in our own eyes; 0 at the first sight of a value."""
        term, beat, since = self._seen.get(lease.name, (-1, -1, 0.0))
        if (term, beat) != (lease.term, lease.beat):
            self._seen[lease.name] = (lease.term, lease.beat, boottime_s)
            return 0.0
        return boottime_s - since

    def is_expired(self, lease: Lease, boottime_s: float) -> bool:
        """Tell whether the holder has released the row or let a whole ttl pass before our eyes."""
        return not lease.owner or self.unchanged_for_s(lease, boottime_s) >= lease.ttl_ms / 1000


def read(session: Session, name: str) -> Lease | None:
    row = session.execute(sa.select(_table).where(_table.c.name == name)).one_or_none()
    return build(Lease, row) if row else None


def named(session: Session, prefix: str = "") -> tuple[Lease, ...]:
    """Return every lease whose name starts with `prefix`, by name."""
    query = sa.select(_table).where(_table.c.name.startswith(prefix, autoescape=True)).order_by(_table.c.name)
    return tuple(build(Lease, row) for row in session.execute(query))


def take(
    session: Session,
    name: str,
    *,
    owner: str,
    seen: Lease | None,
    ttl_ms: int,
    now: datetime,
    context: Mapping[str, Any] | None = None,
) -> Lease | None:
    """Take the row at the next term if it still is as `seen` (None: no row yet); None where somebody was faster."""
    values = {"owner": owner, "ttl_ms": ttl_ms, "context": dict(context or {}), "renewed_at": now}
    if seen is None:
        try:
            with session.begin_nested():
                session.execute(_table.insert().values(name=name, term=1, beat=1, **values))
        except IntegrityError:
            return None
        return read(session, name)
    changed = session.execute(
        _table.update()
        .where(_table.c.name == name, _table.c.term == seen.term, _table.c.beat == seen.beat, _table.c.owner == seen.owner)
        .values(term=seen.term + 1, beat=seen.beat + 1, **values)
    )
    return read(session, name) if getattr(changed, "rowcount", 0) == 1 else None


def renew(session: Session, held: Lease, *, now: datetime, context: Mapping[str, Any] | None = None) -> Lease | None:
    """Raise the beat of a row that is still ours; None where it was stolen."""
    values: dict[str, Any] = {"beat": _table.c.beat + 1, "renewed_at": now}
    if context is not None:
        values["context"] = dict(context)
    changed = session.execute(
        _table.update()
        .where(_table.c.name == held.name, _table.c.owner == held.owner, _table.c.term == held.term)
        .values(**values)
    )
    return read(session, held.name) if getattr(changed, "rowcount", 0) == 1 else None


def release(session: Session, held: Lease, *, now: datetime) -> None:
    """Give the row back so that a successor need not wait; nothing happens where it was stolen."""
    session.execute(
        _table.update()
        .where(_table.c.name == held.name, _table.c.owner == held.owner, _table.c.term == held.term)
        .values(owner="", beat=_table.c.beat + 1, renewed_at=now)
    )


def remove(session: Session, seen: Lease) -> None:
    """Forget a row (a gateway that is long gone) unless it moved since it was `seen`."""
    session.execute(_table.delete().where(_table.c.name == seen.name, _table.c.term == seen.term, _table.c.beat == seen.beat))


def assert_leader(session: Session, term: int) -> None:
    """Fence this transaction: Conflict("not-leader") unless `term` is the engine's present one, until we commit.

    Conflict("database-behind") while the database is known to be older than the fleet.

    PostgreSQL: FOR SHARE keeps a contender's UPDATE waiting for our commit. SQLite: we hold the only write transaction.
    """
    row = session.execute(_LEADERS_TERM).one_or_none()
    present = row.term if row is not None else None
    if row is None or present != term:
        raise Conflict("not-leader", "another engine leads now", term=term, present_term=present)
    if row.is_behind:
        behind.refuse(session)


# --- revocations ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """The end of granting to a host. `acknowledgements`: per gateway, how long before it said so it had last
    granted a renewal (ms by its own clock; -1: never)."""

    host_id: str
    number: int
    term: int
    acknowledgements: Mapping[str, int]
    created_at: datetime


def revoke(session: Session, host_id: str, *, term: int, now: datetime) -> Revocation:
    """End all granting to a host; in force once every live gateway has acknowledged it or that gateway's lease has ended."""
    table = schema.lease_revocation
    known = _revocation(session, host_id)
    if known is None:
        session.execute(table.insert().values(host_id=host_id, number=1, term=term, acknowledgements={}, created_at=now))
    else:
        session.execute(
            table.update()
            .where(table.c.host_id == host_id)
            .values(number=known.number + 1, term=term, acknowledgements={}, created_at=now)
        )
    revocation = _revocation(session, host_id)
    assert revocation is not None
    return revocation


def lift_revocation(session: Session, host_id: str) -> None:
    """Let gateways grant to the host again."""
    table = schema.lease_revocation
    session.execute(table.delete().where(table.c.host_id == host_id))


def revocations(session: Session) -> tuple[Revocation, ...]:
    """Return every revocation; there are only as many as hosts that are being recovered or removed."""
    return tuple(build(Revocation, row) for row in session.execute(sa.select(schema.lease_revocation)))


def acknowledge(session: Session, host_id: str, *, number: int, gateway_id: str, granted_ago_ms: int) -> None:
    """Record that a gateway has stopped granting to the host; the caller stopped before it says so here."""
    table = schema.lease_revocation
    known = _revocation(session, host_id)
    if known is None or known.number != number:
        return
    session.execute(
        table.update()
        .where(table.c.host_id == host_id)
        .values(acknowledgements={**known.acknowledgements, gateway_id: granted_ago_ms})
    )


def _revocation(session: Session, host_id: str) -> Revocation | None:
    table = schema.lease_revocation
    row = session.execute(sa.select(table).where(table.c.host_id == host_id).with_for_update()).one_or_none()
    return build(Revocation, row) if row else None
