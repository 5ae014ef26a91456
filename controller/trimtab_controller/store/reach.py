"""Which host reaches which pool and network, as proven by the host itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema
from trimtab_controller.store.host_reports import PoolReport, store_pools
from trimtab_protos.messages import PoolObservation


@dataclass(frozen=True, slots=True)
class UpHost:
    id: str
    name: str


def up_hosts(session: Session) -> tuple[UpHost, ...]:
    """Return the hosts that are joined and up, by id."""
    host = schema.host
    query = sa.select(host.c.id, host.c.name).where(host.c.deleted_at.is_(None), host.c.connectivity == "up").order_by(host.c.id)
    return tuple(UpHost(row.id, row.name) for row in session.execute(query))


def unknown_pools(session: Session, host_id: str) -> tuple[str, ...]:
    """Return the live pools that nobody has looked at on this host."""
    return _unknown(session, schema.pool, schema.pool_host, "pool_id", host_id)


def unknown_networks(session: Session, host_id: str) -> tuple[str, ...]:
    return _unknown(session, schema.network, schema.network_host, "network_id", host_id)


def _unknown(session: Session, things: sa.Table, mapping: sa.Table, key: str, host_id: str) -> tuple[str, ...]:
    query = (
        sa.select(things.c.id)
        .join(mapping, mapping.c[key] == things.c.id)
        .where(mapping.c.host_id == host_id, mapping.c.state == "unknown", things.c.deleted_at.is_(None))
        .order_by(things.c.id)
    )
    return tuple(session.scalars(query))


def ready_hosts(session: Session, pool_id: str) -> tuple[UpHost, ...]:
    """Return the hosts that are up and have proven to reach the pool."""
    host, mapping = schema.host, schema.pool_host
    query = (
        sa.select(host.c.id, host.c.name)
        .join(mapping, sa.and_(mapping.c.host_id == host.c.id, mapping.c.pool_id == pool_id))
        .where(host.c.deleted_at.is_(None), host.c.connectivity == "up", mapping.c.state == "ready")
        .order_by(host.c.id)
    )
    return tuple(UpHost(row.id, row.name) for row in session.execute(query))


def roomiest_host(session: Session, pool_id: str) -> str:
    """Return the host whose local pool has the most space available; "" when none is ready."""
    space = schema.pool_space
    ready = {host.id for host in ready_hosts(session, pool_id)}
    query = sa.select(space.c.host_id).where(space.c.pool_id == pool_id).order_by(space.c.available_bytes.desc())
    return next((host_id for host_id in session.scalars(query) if host_id in ready), "")


def record_pool(
    session: Session, pool_id: str, host_id: str, *, observation: PoolObservation | None, problem: str, now: datetime
) -> None:
    """Record what one host found; a row is made where the host joined after the pool was."""
    ensure_row(session, schema.pool_host, pool_id=pool_id, host_id=host_id)
    if observation is not None and not problem:
        store_pools(session, [PoolReport(host_id, observation)], now=now)
        return
    mapping = schema.pool_host
    session.execute(
        mapping.update()
        .where(mapping.c.pool_id == pool_id, mapping.c.host_id == host_id)
        .values(state="failed", problem=problem[:500], observed_at=now)
    )


def record_network(session: Session, network_id: str, host_id: str, *, problem: str, now: datetime) -> None:
    """Record whether guests of the host can use the network."""
    ensure_row(session, schema.network_host, network_id=network_id, host_id=host_id)
    mapping = schema.network_host
    session.execute(
        mapping.update()
        .where(mapping.c.network_id == network_id, mapping.c.host_id == host_id)
        .values(state="failed" if problem else "ready", problem=problem[:500], observed_at=now)
    )


def ensure_row(session: Session, mapping: sa.Table, **key: str) -> None:
    conditions = [mapping.c[name] == value for name, value in key.items()]
    if session.execute(sa.select(sa.literal(1)).select_from(mapping).where(*conditions)).one_or_none() is None:
        session.execute(mapping.insert().values(state="unknown", **key))


def prove_sharing(session: Session, pool_id: str, *, now: datetime) -> None:
    """Record that every host that is up has read what another wrote; volumes may be placed from now on."""
    table = schema.pool
    session.execute(table.update().where(table.c.id == pool_id).values(sharing_proven_at=now))


def erase(session: Session, table: sa.Table, identifier: str, *, now: datetime) -> None:
    """Hide a pool, network or image for ever: its name is free, its row is a tombstone."""
    session.execute(table.update().where(table.c.id == identifier).values(deleted_at=sa.func.coalesce(table.c.deleted_at, now)))


def forget_mappings(session: Session, mapping: sa.Table, **key: Any) -> None:
    session.execute(mapping.delete().where(*[mapping.c[name] == value for name, value in key.items()]))


def finish_image(session: Session, image_id: str, **values: Any) -> None:
    """Write what an import proved and make the image usable."""
    table = schema.image
    session.execute(table.update().where(table.c.id == image_id).values(state="ready", version=table.c.version + 1, **values))


def fail_image(session: Session, image_id: str, *, now: datetime) -> None:
    table = schema.image
    session.execute(table.update().where(table.c.id == image_id, table.c.state != "ready").values(state="failed", deleted_at=now))


def names_of(session: Session, host_ids: Sequence[str]) -> dict[str, str]:
    rows = session.execute(sa.select(schema.host.c.id, schema.host.c.name).where(schema.host.c.id.in_(host_ids)))
    return {row.id: row.name for row in rows}
