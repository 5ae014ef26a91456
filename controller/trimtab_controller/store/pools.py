"""Pools in SQL: rows, lists, their state and space per host."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Pool, PoolSpace
from trimtab_controller.store import keyset, lookup, schema
from trimtab_controller.store.rows import build, columns_of
from trimtab_controller.store.volumes import holds_bytes
from trimtab_protos.messages import PoolKind, PoolSpec

_table = schema.pool

FILTERS: keyset.Filters = {
    "name": keyset.equals(_table.c.name),
    "kind": keyset.equals(_table.c.kind),
    "is_shared": keyset.is_true(_table.c.is_shared, "is_shared"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VmInPool:
    """A vm with disks in a pool."""

    name: str
    project: str
    # '' where it has no home.
    host_id: str
    observed_state: str
    observed_reason: str
    desired_power: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOnHost:
    """What one host says of a pool."""

    pool_id: str
    host_id: str
    # unknown, ready, failed or unresponsive.
    state: str
    problem: str
    observed_at: datetime | None


def insert(
    session: Session,
    *,
    pool_id: str,
    name: str,
    kind: str,
    path: str,
    is_shared: bool,
    is_default: bool,
    now: datetime,
    reserve_permille: int = 50,
    settings: Mapping[str, Any] | None = None,
) -> Pool:
    return lookup.insert_named(
        session,
        _table,
        Pool,
        "pool",
        id=pool_id,
        name=name,
        kind=kind,
        path=path,
        is_shared=is_shared,
        reserve_permille=reserve_permille,
        settings={"is_default": is_default, **(settings or {})},
        created_at=now,
    )


def find(session: Session, name_or_id: str) -> Pool | None:
    return lookup.find(session, _table, Pool, name_or_id)


def defaults(session: Session) -> tuple[Pool, ...]:
    """Return the candidates for "the pool" when nobody names one: the flagged one, else every live pool."""
    query = sa.select(*columns_of(_table, Pool)).where(_table.c.deleted_at.is_(None)).order_by(_table.c.name)
    rows = session.execute(query).all()
    flagged = [row for row in rows if row.settings.get("is_default")]
    return tuple(build(Pool, row) for row in flagged or rows if row.kind in {PoolKind.DIR, PoolKind.NFS})


def default_ids(session: Session) -> frozenset[str]:
    """Return the ids of pools flagged as default (at most one)."""
    rows = session.execute(sa.select(_table.c.id, _table.c.settings).where(_table.c.deleted_at.is_(None)))
    return frozenset(row.id for row in rows if row.settings.get("is_default"))


def page(session: Session, page: keyset.Page) -> tuple[tuple[Pool, ...], tuple[str, str] | None]:
    query = sa.select(*columns_of(_table, Pool)).where(_table.c.deleted_at.is_(None))
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(Pool, row) for row in found.rows), found.next_after


def hosts_of(session: Session, pool_ids: Sequence[str]) -> dict[str, tuple[PoolOnHost, ...]]:
    """Return what each host says of each pool; one query."""
    table = schema.pool_host
    found: dict[str, list[PoolOnHost]] = {pool_id: [] for pool_id in pool_ids}
    for row in session.execute(sa.select(table).where(table.c.pool_id.in_(pool_ids)).order_by(table.c.host_id)):
        found[row.pool_id].append(build(PoolOnHost, row))
    return {pool_id: tuple(states) for pool_id, states in found.items()}


def specs_of(session: Session, pool_ids: Collection[str]) -> dict[str, PoolSpec]:
    """Return the live ones of these pools, as hosts are told them."""
    query = sa.select(_table).where(_table.c.id.in_(pool_ids), _table.c.deleted_at.is_(None))
    return {
        row.id: PoolSpec(pool_id=row.id, path=row.path, name=row.name, kind=PoolKind(row.kind), is_shared=row.is_shared)
        for row in session.execute(query)
    }


def spaces_of(session: Session, pool_ids: Sequence[str]) -> dict[str, tuple[PoolSpace, ...]]:
    """Return the space of each pool at each place; one query."""
    table = schema.pool_space
    found: dict[str, list[PoolSpace]] = {pool_id: [] for pool_id in pool_ids}
    for row in session.execute(sa.select(table).where(table.c.pool_id.in_(pool_ids)).order_by(table.c.host_id)):
        found[row.pool_id].append(build(PoolSpace, row))
    return {pool_id: tuple(spaces) for pool_id, spaces in found.items()}


def live(session: Session) -> tuple[Pool, ...]:
    """Return every live pool, by name."""
    query = sa.select(*columns_of(_table, Pool)).where(_table.c.deleted_at.is_(None)).order_by(_table.c.name)
    return tuple(build(Pool, row) for row in session.execute(query))


def at_path(session: Session, path: str) -> Pool | None:
    """Return a live pool that has this path already, or one inside or around it: each would count and remove the other's files."""
    live = session.execute(sa.select(*columns_of(_table, Pool)).where(_table.c.deleted_at.is_(None)).order_by(_table.c.name))
    found = (build(Pool, row) for row in live)
    return next(
        (pool for pool in found if f"{pool.path}/".startswith(f"{path}/") or f"{path}/".startswith(f"{pool.path}/")), None
    )


def of_source(session: Session, server: str, export: str) -> Pool | None:
    """Return the live pool that mounts this export already."""
    return next(
        (one for one in live(session) if (one.settings.get("server"), one.settings.get("export")) == (server, export)), None
    )


def vms_in(session: Session, pool_id: str, *, limit: int = 100) -> tuple[VmInPool, ...]:
    """Return the vms with disks in the pool, by name."""
    volume, vm, project = schema.volume, schema.vm, schema.project
    query = (
        sa.select(
            vm.c.name,
            project.c.name.label("project"),
            vm.c.host_id,
            vm.c.observed_state,
            vm.c.observed_reason,
            vm.c.desired_power,
        )
        .join(volume, volume.c.vm_id == vm.c.id)
        .join(project, project.c.id == vm.c.project_id)
        .where(sa.or_(volume.c.pool_id == pool_id, volume.c.other_pool_id == pool_id), vm.c.deleted_at.is_(None))
        .distinct()
        .order_by(vm.c.name, project.c.name)
        .limit(limit)
    )
    return tuple(build(VmInPool, dict(row._mapping)) for row in session.execute(query))


def dependants(session: Session, pool_id: str, *, limit: int = 5) -> dict[str, tuple[str, ...]]:
    """Return the names of volumes and images that lie in the pool, by noun; those of deleted vms and volumes are told apart."""
    volume, image, replica = schema.volume, schema.image, schema.image_replica
    is_there = sa.or_(volume.c.pool_id == pool_id, volume.c.other_pool_id == pool_id)
    volumes = sa.select(volume.c.name).where(is_there, holds_bytes()).order_by(volume.c.name).limit(limit)
    of_deleted_vm = volume.c.vm_id.in_(sa.select(schema.vm.c.id).where(schema.vm.c.deleted_at.is_not(None)))
    is_deleted = sa.or_(volume.c.deleted_at.is_not(None), sa.func.coalesce(of_deleted_vm, sa.false()))
    # An image is lost with its last replica; a copy of one that is elsewhere too is only a cache entry.
    elsewhere = sa.select(replica.c.image_id).where(replica.c.pool_id != pool_id, replica.c.state == "ready").scalar_subquery()
    images = (
        sa.select(image.c.name)
        .where(image.c.deleted_at.is_(None), image.c.id.not_in(elsewhere))
        .where(image.c.id.in_(sa.select(replica.c.image_id).where(replica.c.pool_id == pool_id)))
    )
    found = {
        "volume": tuple(session.scalars(volumes.where(sa.not_(is_deleted)))),
        "deleted volume": tuple(session.scalars(volumes.where(is_deleted))),
        "image": tuple(session.scalars(images.order_by(image.c.name).limit(limit))),
    }
    return {noun: names for noun, names in found.items() if names}


def tell(contents: dict[str, tuple[str, ...]]) -> str:
    """Return in words what `dependants` found, and how what was deleted goes at once."""
    told = "; ".join(f"{noun}s {', '.join(names)}" for noun, names in contents.items())
    hint = " (they go when their 24 h are over, or by `trimtab vm purge` and `trimtab volume purge`)"
    return told + hint * ("deleted volume" in contents)


def check_version(session: Session, pool_id: str, expected_version: int | None) -> None:
    """Raise the version; Conflict `stale-etag` where it is not the expected one."""
    lookup.update_version(session, _table, "the pool", pool_id, expected_version=expected_version)


def on_host(session: Session, host_id: str) -> tuple[PoolOnHost, ...]:
    """Return what one host says of each live pool."""
    table = schema.pool_host
    query = sa.select(table).join(_table, _table.c.id == table.c.pool_id)
    rows = session.execute(query.where(table.c.host_id == host_id, _table.c.deleted_at.is_(None)).order_by(_table.c.name))
    return tuple(build(PoolOnHost, row) for row in rows)
