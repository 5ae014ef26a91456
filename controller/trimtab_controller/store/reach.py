"""Which host reaches which pool and network, as proven by the host itself, and what goes when a host leaves.

A row per (pool, host) and (network, host) of everything live: `unknown` until a saga has asked, then `ready`, or `failed` with the
reason. Heartbeats keep the pools' rows fresh afterwards (`host_reports.py`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import LIVE_STATES, DesiredPower, ObservedState
from trimtab_controller.store import claims, describe, schema, vms, volume_claims
from trimtab_controller.store.host_reports import PoolReport, store_pools
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import PoolKind, PoolObservation

FILE_KINDS = (PoolKind.DIR, PoolKind.NFS)
READY, FAILED, UNKNOWN, UNRESPONSIVE = "ready", "failed", "unknown", "unresponsive"


@dataclass(frozen=True, slots=True)
class UpHost:
    id: str
    name: str


def up_hosts(session: Session) -> tuple[UpHost, ...]:
    """Return the hosts that are joined and up, by id."""
    host = schema.host
    query = sa.select(host.c.id, host.c.name).where(host.c.deleted_at.is_(None), host.c.connectivity == "up").order_by(host.c.id)
    return tuple(UpHost(row.id, row.name) for row in session.execute(query))


# --- pools -----------------------------------------------------------------------------------------------------------------


def unknown_pools(session: Session, host_id: str) -> tuple[str, ...]:
    """Return the live pools that nobody has looked at on this host."""
    return _unknown(session, schema.pool, schema.pool_host, "pool_id", host_id)


def ready_hosts(session: Session, pool_id: str) -> tuple[UpHost, ...]:
    """Return the hosts that are up and have proven to reach the pool."""
    mapping = schema.pool_host
    ready = sa.select(mapping.c.host_id).where(mapping.c.pool_id == pool_id, mapping.c.state == READY)
    known = set(session.scalars(ready))
    return tuple(host for host in up_hosts(session) if host.id in known)


def hosts_by_space(session: Session, pool_id: str) -> tuple[UpHost, ...]:
    """Return the hosts that are up and reach the local pool, those with most space available first."""
    space = schema.pool_space
    query = sa.select(space.c.host_id, space.c.available_bytes).where(space.c.pool_id == pool_id)
    available = {row.host_id: int(row.available_bytes) for row in session.execute(query)}
    return tuple(sorted(ready_hosts(session, pool_id), key=lambda host: -available.get(host.id, 0)))


def scratch_pool_id(session: Session, host_id: str) -> str:
    """Return the pool of files that the host reaches and that has most room, its own ones first; "" for none."""
    pool, mapping, space = schema.pool, schema.pool_host, schema.pool_space
    place = sa.case((pool.c.is_shared, schema.SHARED), else_=host_id)
    query = (
        sa.select(pool.c.id)
        .join(mapping, mapping.c.pool_id == pool.c.id)
        .outerjoin(space, sa.and_(space.c.pool_id == pool.c.id, space.c.host_id == place))
        .where(mapping.c.host_id == host_id, mapping.c.state == READY, pool.c.deleted_at.is_(None))
        .where(pool.c.kind.in_([kind.value for kind in FILE_KINDS]))
        .order_by(pool.c.is_shared, sa.func.coalesce(space.c.available_bytes, 0).desc(), pool.c.id)
        .limit(1)
    )
    return str(session.scalar(query) or "")


def record_pool(
    session: Session,
    pool_id: str,
    host_id: str,
    *,
    state: str,
    problem: str,
    observation: PoolObservation | None,
    now: datetime,
) -> None:
    """Record what one host found; a row is made where the host joined after the pool was. Nothing for a host that left."""
    if not _is_member(session, host_id):
        return
    ensure_row(session, schema.pool_host, pool_id=pool_id, host_id=host_id)
    mapping = schema.pool_host
    session.execute(
        mapping.update()
        .where(mapping.c.pool_id == pool_id, mapping.c.host_id == host_id)
        .values(state=state, problem=problem[:500], observed_at=now)
    )
    if observation is not None and state == READY:
        store_pools(session, [PoolReport(host_id, observation)], now=now)


def prove_sharing(session: Session, pool_id: str, *, now: datetime) -> None:
    """Record that every host that has the pool read what another wrote; volumes may be placed from now on."""
    table = schema.pool
    session.execute(
        table.update()
        .where(table.c.id == pool_id, table.c.sharing_proven_at.is_(None))
        .values(sharing_proven_at=now, version=table.c.version + 1)
    )


# --- networks --------------------------------------------------------------------------------------------------------------


def unknown_networks(session: Session, host_id: str) -> tuple[str, ...]:
    """Return the live networks that nobody has looked at on this host."""
    return _unknown(session, schema.network, schema.network_host, "network_id", host_id)


def ask_again(session: Session, host_id: str, *, of_everything: bool = False) -> None:
    """Have a host that starts anew be asked about networks that it could not reach: what was missing there may have been cured.

    `of_everything`: it was told of no pool and no network, so each is made usable there by a host.prepare of its own.
    """
    if of_everything:
        for each in (schema.pool_host, schema.network_host):
            later = each.update().where(each.c.host_id == host_id)
            session.execute(later.values(state=UNKNOWN, problem="the database is behind the fleet; asked once it is not"))
        return
    mapping = schema.network_host
    query = mapping.update().where(mapping.c.host_id == host_id, mapping.c.state == FAILED)
    session.execute(query.values(state=UNKNOWN, problem="its agent started anew; it is asked again"))


def record_network(session: Session, network_id: str, host_id: str, *, state: str, problem: str, now: datetime) -> None:
    """Record whether guests of the host can use the network. Nothing for a host that left."""
    if not _is_member(session, host_id):
        return
    ensure_row(session, schema.network_host, network_id=network_id, host_id=host_id)
    mapping = schema.network_host
    session.execute(
        mapping.update()
        .where(mapping.c.network_id == network_id, mapping.c.host_id == host_id)
        .values(state=state, problem=problem[:500], observed_at=now)
    )


# --- both ------------------------------------------------------------------------------------------------------------------


def ensure_row(session: Session, mapping: sa.Table, **key: str) -> None:
    conditions = [mapping.c[name] == value for name, value in key.items()]
    if session.execute(sa.select(sa.literal(1)).select_from(mapping).where(*conditions)).one_or_none() is None:
        session.execute(mapping.insert().values(state=UNKNOWN, **key))


def map_pool(session: Session, pool_id: str) -> None:
    """Give the pool a row on every host of the fleet, so that those that are not up now are prepared when they are."""
    for host_id in _member_ids(session):
        ensure_row(session, schema.pool_host, pool_id=pool_id, host_id=host_id)


def map_network(session: Session, network_id: str) -> None:
    """Give the network a row on every host of the fleet; mappings to a host's own bridge stay."""
    for host_id in _member_ids(session):
        ensure_row(session, schema.network_host, network_id=network_id, host_id=host_id)


def unmap_pool(session: Session, pool_id: str, *, left: Collection[str] = ()) -> None:
    """Forget on which hosts a pool was, with its space. `left`: hosts that have yet to forget it."""
    session.execute(schema.pool_space.delete().where(schema.pool_space.c.pool_id == pool_id))
    _unmap(session, schema.pool_host, schema.pool_host.c.pool_id == pool_id, left)


def unmap_network(session: Session, network_id: str, *, left: Collection[str] = ()) -> None:
    """Forget on which hosts a network was. `left`: hosts that have yet to forget it."""
    _unmap(session, schema.network_host, schema.network_host.c.network_id == network_id, left)


def _unmap(session: Session, mapping: sa.Table, is_it: sa.ColumnElement[bool], left: Collection[str]) -> None:
    session.execute(mapping.delete().where(is_it, mapping.c.host_id.not_in(left)))
    session.execute(mapping.update().where(is_it).values(state=UNKNOWN, problem="it was deleted and is to go from here"))


def deleted_pools(session: Session, host_id: str) -> tuple[str, ...]:
    """Return the deleted pools that this host has yet to forget."""
    return _unknown(session, schema.pool, schema.pool_host, "pool_id", host_id, is_live=False)


def deleted_networks(session: Session, host_id: str) -> tuple[str, ...]:
    """Return the deleted networks that this host has yet to forget."""
    return _unknown(session, schema.network, schema.network_host, "network_id", host_id, is_live=False)


def forget_deleted(session: Session, host_id: str, *, pool_ids: Collection[str], network_ids: Collection[str]) -> None:
    """Record that this host has nothing of these any more."""
    for mapping, key, ids in ((schema.pool_host, "pool_id", pool_ids), (schema.network_host, "network_id", network_ids)):
        session.execute(mapping.delete().where(mapping.c.host_id == host_id, mapping.c[key].in_(ids)))


def hide_pool(session: Session, pool_id: str, *, now: datetime) -> None:
    """Hide a pool for ever: its name and path are free, its row is a tombstone."""
    _hide(session, schema.pool, pool_id, now=now)


def hide_network(session: Session, network_id: str, *, now: datetime) -> None:
    """Hide a network for ever: its name is free, its row is a tombstone."""
    _hide(session, schema.network, network_id, now=now)


def hide_image(session: Session, image_id: str, *, now: datetime) -> None:
    """Hide an image for ever: its name is free, its row is a tombstone."""
    _hide(session, schema.image, image_id, now=now)


def is_live_pool(session: Session, pool_id: str) -> bool:
    return _is_live(session, schema.pool, pool_id)


def is_live_network(session: Session, network_id: str) -> bool:
    return _is_live(session, schema.network, network_id)


# --- images ----------------------------------------------------------------------------------------------------------------


def finish_image(session: Session, image_id: str, **values: Any) -> None:
    """Write what an import proved and make the image usable."""
    table = schema.image
    session.execute(table.update().where(table.c.id == image_id).values(state="ready", version=table.c.version + 1, **values))


def fail_image(session: Session, image_id: str, *, now: datetime) -> None:
    """Hide an image that never came to be: its name is free."""
    table = schema.image
    session.execute(
        table.update()
        .where(table.c.id == image_id, table.c.deleted_at.is_(None))
        .values(state="failed", deleted_at=now, version=table.c.version + 1)
    )


# --- the end of a host -------------------------------------------------------------------------------------------------------


def set_cordon(session: Session, host_id: str, *, is_cordoned: bool) -> bool:
    """Cordon or uncordon; return whether it was cordoned before."""
    table = schema.host
    was = session.execute(sa.select(table.c.is_cordoned).where(table.c.id == host_id)).scalar_one()
    session.execute(table.update().where(table.c.id == host_id).values(is_cordoned=is_cordoned, version=table.c.version + 1))
    return bool(was)


def check_no_work_on(session: Session, host_id: str) -> None:
    """Raise Conflict(`host-busy`) while an operation works on a vm that the host holds: it would act on a host that left."""
    operation = schema.operation
    query = (
        sa.select(operation.c.kind, operation.c.subject_name, operation.c.id)
        .where(
            operation.c.subject_id.in_(_held_vms(session, host_id)),
            operation.c.is_exclusive,
            operation.c.state.in_([state.value for state in LIVE_STATES]),
        )
        .order_by(operation.c.id)
        .limit(5)
    )
    busy = [f"{row.kind} of {row.subject_name} ({row.id})" for row in session.execute(query)]
    if busy:
        raise Conflict("host-busy", f"operations work on this host's vms: {', '.join(busy)}; wait for them or cancel them")


def left_behind(session: Session, host_id: str, *, limit: int = 5) -> dict[str, tuple[str, ...]]:
    """Return, by noun, names of what would be lost with the host: its vms, volumes apart from vms, images found only there."""
    vm, image = schema.vm, schema.image
    vm_names = sa.select(vm.c.name).where(vm.c.id.in_(_held_vms(session, host_id)), vm.c.deleted_at.is_(None))
    image_names = sa.select(image.c.name).where(image.c.id.in_(_only_images(session, host_id)))
    found = {
        "vms": tuple(session.scalars(vm_names.order_by(vm.c.name).limit(limit))),
        "volumes": tuple(volume.name for volume in volume_claims.apart_on(session, host_id))[:limit],
        "images": tuple(session.scalars(image_names.order_by(image.c.name).limit(limit))),
    }
    return {noun: names for noun, names in found.items() if names}


def release_everything(session: Session, host_id: str, *, now: datetime) -> tuple[str, ...]:
    """Let go of all that lives on the host without touching it: vms, volumes apart from vms, images found only there.

    Their rows become tombstones at once. None of it is ever purged, since the guests may run on as plain libvirt domains. What they
    held in SQL is free. Returns the ids of the vms that were live.
    """
    released = []
    for vm_id in sorted(_held_vms(session, host_id)):
        parts = describe.read_vm(session, vm_id)
        if parts.vm.deleted_at is None:
            released.append(vm_id)
        elif all(volume.host_id != host_id for volume in parts.volumes):
            # Deleted and within its grace, its disks elsewhere: it can still be brought back, and is purged and charged till then.
            vms.update(session, vm_id, host_id="")
            continue
        claims.give_back(session, vm_id)
        claims.end_migration(session, vm_id)
        volume_claims.erase(session, parts.volumes, now=now)
        vms.delete_nics(session, vm_id)
        vms.charge_project(session, parts.vm, disk_bytes=sum(volume.size_bytes for volume in parts.volumes), sign=-1)
        vms.update(
            session,
            vm_id,
            deleted_at=parts.vm.deleted_at or now,
            purge_after=None,
            purged_at=now,
            host_id="",
            desired_power=DesiredPower.DELETED.value,
            observed_state=ObservedState.UNKNOWN.value,
            observed_reason="released",
        )
    for volume in volume_claims.apart_on(session, host_id):
        volume_claims.release(session, volume, now=now)
    for volume in volume_claims.hidden_on(session, host_id):
        volume_claims.free(session, volume, now=now)
    for image_id in _only_images(session, host_id):
        hide_image(session, image_id, now=now)
        session.execute(schema.image_replica.delete().where(schema.image_replica.c.image_id == image_id))
    return tuple(released)


def unmap_host(session: Session, host_id: str) -> None:
    """Forget the host's pools, networks, replicas, space and the MACs that were seen on it."""
    for table in (
        schema.pool_host,
        schema.network_host,
        schema.image_replica,
        schema.pool_space,
        schema.unmanaged_mac,
        schema.lease_revocation,
    ):
        session.execute(table.delete().where(table.c.host_id == host_id))


# --- parts -----------------------------------------------------------------------------------------------------------------


def _unknown(
    session: Session, things: sa.Table, mapping: sa.Table, key: str, host_id: str, *, is_live: bool = True
) -> tuple[str, ...]:
    query = (
        sa.select(things.c.id)
        .join(mapping, mapping.c[key] == things.c.id)
        .where(mapping.c.host_id == host_id, mapping.c.state == UNKNOWN)
        .where(things.c.deleted_at.is_(None) if is_live else things.c.deleted_at.is_not(None))
        .order_by(things.c.id)
    )
    return tuple(session.scalars(query))


def _member_ids(session: Session) -> tuple[str, ...]:
    table = schema.host
    return tuple(session.scalars(sa.select(table.c.id).where(table.c.deleted_at.is_(None)).order_by(table.c.id)))


def _is_member(session: Session, host_id: str) -> bool:
    return _is_live(session, schema.host, host_id)


def _is_live(session: Session, table: sa.Table, identifier: str) -> bool:
    query = sa.select(table.c.id).where(table.c.id == identifier, table.c.deleted_at.is_(None))
    return session.execute(query).one_or_none() is not None


def _hide(session: Session, table: sa.Table, identifier: str, *, now: datetime) -> None:
    session.execute(
        table.update()
        .where(table.c.id == identifier, table.c.deleted_at.is_(None))
        .values(deleted_at=now, version=table.c.version + 1)
    )


def _held_vms(session: Session, host_id: str) -> Collection[str]:
    """Return the ids of unpurged vms that are placed on the host, hold a claim there, or have a disk on one of its local pools."""
    vm, claim, volume = schema.vm, schema.claim, schema.volume
    is_there = vm.c.purged_at.is_(None)
    placed = sa.select(vm.c.id).where(vm.c.host_id == host_id, is_there)
    claimed = sa.select(vm.c.id).join(claim, claim.c.vm_id == vm.c.id).where(claim.c.host_id == host_id, is_there)
    stored = sa.select(vm.c.id).join(volume, volume.c.vm_id == vm.c.id).where(volume.c.host_id == host_id, is_there)
    return set(session.scalars(placed)) | set(session.scalars(claimed)) | set(session.scalars(stored))


def _only_images(session: Session, host_id: str) -> tuple[str, ...]:
    """Return the live images whose only ready replicas are on the host's local pools."""
    image, replica = schema.image, schema.image_replica
    ready = sa.select(replica.c.image_id).where(replica.c.state == READY)
    query = (
        sa.select(image.c.id)
        .where(image.c.deleted_at.is_(None), image.c.state == READY)
        .where(image.c.id.in_(ready.where(replica.c.host_id == host_id)))
        .where(image.c.id.not_in(ready.where(replica.c.host_id != host_id)))
        .order_by(image.c.id)
    )
    return tuple(session.scalars(query))
