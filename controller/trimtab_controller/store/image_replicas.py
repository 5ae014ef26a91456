"""Where images are.

A replica's row is there before its file: `copying`, owned by the operation that brings it. Where that operation ended without
bringing it, the row stays, so that the image's deletion knows every place that may have a file; the next copy takes it over.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Image, ImageReplica, Pool, Volume
from trimtab_controller.store import describe, schema, vms
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import Unavailable

_table = schema.image_replica

_OF_IMAGE = sa.select(*columns_of(_table, ImageReplica)).where(_table.c.image_id == sa.bindparam("image_id"))


@dataclass(frozen=True, slots=True)
class Missing:
    """An image that has to come to a pool, and a replica to read from ("" when no host that is up has one)."""

    image: Image
    pool: Pool
    source_host_id: str
    source_pool: Pool


def of_image(session: Session, image_id: str) -> tuple[ImageReplica, ...]:
    return tuple(build(ImageReplica, row) for row in session.execute(_OF_IMAGE, {"image_id": image_id}))


def missing_for_vm(session: Session, vm_id: str, host_id: str) -> tuple[Missing, ...]:
    """Return the base images of the vm's volumes and the ISOs in its drives that are not yet where they will be on `host_id`."""
    volumes, vm = describe.volumes_of(session, vm_id), vms.get(session, vm_id)
    home = describe.state_volume(volumes)
    isos = {image_id for image_id in (vm.cdrom_image_id, vm.drivers_image_id) if image_id} if home is not None else set()
    wanted = _bases(volumes) | {(image_id, home.pool_id) for image_id in isos if home is not None}
    return _missing(session, wanted, host_id)


def missing_for(session: Session, volumes: Sequence[Volume], host_id: str) -> tuple[Missing, ...]:
    """Return the base images of these volumes that are not yet where the volumes will be on `host_id`."""
    return _missing(session, _bases(volumes), host_id)


def _bases(volumes: Sequence[Volume]) -> set[tuple[str, str]]:
    return {(volume.base_image_id, volume.pool_id) for volume in volumes if volume.base_image_id}


def _missing(session: Session, wanted: Collection[tuple[str, str]], host_id: str) -> tuple[Missing, ...]:
    """Return which of these images (id, pool) have no ready replica at their place on the host."""
    missing = []
    for image_id, pool_id in sorted(wanted):
        pool = describe.get_pool(session, pool_id)
        place = "" if pool.is_shared else host_id
        replicas = of_image(session, image_id)
        if any(one.pool_id == pool_id and one.host_id == place and one.state == "ready" for one in replicas):
            continue
        source_host_id, source_pool_id = _source(session, replicas)
        source_pool = describe.get_pool(session, source_pool_id) if source_pool_id else pool
        missing.append(Missing(describe.get_image(session, image_id), pool, source_host_id, source_pool))
    return tuple(missing)


def begin(session: Session, missing: Sequence[Missing], host_id: str, *, operation_id: str, now: datetime) -> None:
    """Note that these images are about to be copied to where `host_id` keeps them."""
    for one in missing:
        place = "" if one.pool.is_shared else host_id
        begin_at(session, image_id=one.image.id, pool_id=one.pool.id, host_id=place, operation_id=operation_id, now=now)


def begin_at(session: Session, *, image_id: str, pool_id: str, host_id: str, operation_id: str, now: datetime) -> None:
    """Note that an image is about to come to a place; the present owner of a copy under way is replaced, a ready one stays."""
    key = (_table.c.image_id == image_id, _table.c.pool_id == pool_id, _table.c.host_id == host_id)
    state = session.execute(sa.select(_table.c.state).where(*key).with_for_update()).scalar_one_or_none()
    if state == "deleting":
        raise Unavailable("replica-leaving", "the image is just being cleaned up there; it is copied again once that is over")
    if state is None:
        values = {"image_id": image_id, "pool_id": pool_id, "host_id": host_id, "state": "copying"}
        session.execute(_table.insert().values(**values, owner_operation_id=operation_id, created_at=now))
    else:
        session.execute(_table.update().where(*key, _table.c.state == "copying").values(owner_operation_id=operation_id))


def record(session: Session, missing: Sequence[Missing], host_id: str, *, now: datetime) -> None:
    """Record the replicas that were missing, now that they are there."""
    for one in missing:
        place = "" if one.pool.is_shared else host_id
        add(session, image_id=one.image.id, pool_id=one.pool.id, host_id=place, now=now)


def add(session: Session, *, image_id: str, pool_id: str, host_id: str, now: datetime) -> None:
    """Record a ready replica; recording it twice is fine."""
    key = (_table.c.image_id == image_id, _table.c.pool_id == pool_id, _table.c.host_id == host_id)
    changed = session.execute(_table.update().where(*key).values(state="ready", owner_operation_id=""))
    if getattr(changed, "rowcount", 0) == 0:
        session.execute(
            _table.insert().values(image_id=image_id, pool_id=pool_id, host_id=host_id, state="ready", created_at=now)
        )


def in_pool(session: Session, pool_id: str) -> tuple[ImageReplica, ...]:
    """Return every replica that lies in the pool, or may."""
    rows = session.execute(sa.select(*columns_of(_table, ImageReplica)).where(_table.c.pool_id == pool_id))
    return tuple(build(ImageReplica, row) for row in rows)


def remove_from_pool(session: Session, pool_id: str) -> None:
    session.execute(_table.delete().where(_table.c.pool_id == pool_id))


def remove(session: Session, image_id: str) -> None:
    session.execute(_table.delete().where(_table.c.image_id == image_id))


# --- cleaning up ---------------------------------------------------------------------------------------------------------


def idle(session: Session, *, before: datetime, limit: int) -> tuple[tuple[ImageReplica, str, str], ...]:
    """Return (replica, the image's name, its project) of copies on local pools that are older than `before`, that nothing uses
    and that are not the image's last, on hosts that are up. One per image: each is looked at again before it goes.
    """
    image, host, other = schema.image, schema.host, _table.alias("other")
    is_elsewhere = sa.exists().where(
        other.c.image_id == _table.c.image_id,
        other.c.state == "ready",
        sa.or_(other.c.pool_id != _table.c.pool_id, other.c.host_id != _table.c.host_id),
    )
    query = (
        sa.select(*columns_of(_table, ImageReplica), image.c.name, image.c.project_id)
        .join(image, image.c.id == _table.c.image_id)
        .join(host, host.c.id == _table.c.host_id)
        .where(_table.c.state == "ready", _table.c.created_at < before, image.c.deleted_at.is_(None))
        .where(host.c.connectivity == "up", host.c.deleted_at.is_(None), is_elsewhere)
        .where(~_users(_table.c.image_id, _table.c.pool_id, _table.c.host_id))
        .order_by(_table.c.created_at, _table.c.image_id, _table.c.host_id)
        .limit(limit)
    )
    found: dict[str, tuple[ImageReplica, str, str]] = {}
    rows: Sequence[Any] = session.execute(query).all()
    for row in rows:
        found.setdefault(row.image_id, (build(ImageReplica, row), row.name, row.project_id))
    return tuple(found.values())


def is_used(session: Session, *, image_id: str, pool_id: str, host_id: str) -> bool:
    """Tell whether a volume stands on the replica, or will once a migration under way is over."""
    return bool(session.scalar(sa.select(_users(sa.literal(image_id), sa.literal(pool_id), sa.literal(host_id)))))


def begin_eviction(session: Session, *, image_id: str, pool_id: str, host_id: str, operation_id: str) -> bool:
    """Mark a ready replica that nothing uses as leaving; False where it is used or the image's last one."""
    if is_used(session, image_id=image_id, pool_id=pool_id, host_id=host_id):
        return False
    ready = [one for one in of_image(session, image_id) if one.state == "ready"]
    if len(ready) < 2:
        return False
    key = (_table.c.image_id == image_id, _table.c.pool_id == pool_id, _table.c.host_id == host_id)
    marked = session.execute(
        _table.update().where(*key, _table.c.state == "ready").values(state="deleting", owner_operation_id=operation_id)
    )
    return getattr(marked, "rowcount", 0) == 1


def end_eviction(session: Session, *, image_id: str, pool_id: str, host_id: str, is_removed: bool) -> None:
    key = (_table.c.image_id == image_id, _table.c.pool_id == pool_id, _table.c.host_id == host_id, _table.c.state == "deleting")
    if is_removed:
        session.execute(_table.delete().where(*key))
    else:
        session.execute(_table.update().where(*key).values(state="ready", owner_operation_id=""))


def _users(image_id: Any, pool_id: Any, host_id: Any) -> sa.Exists:
    """A volume of the image in the pool whose bytes are on the host, or whose vm has a claim there; one without bytes yet too."""
    volume, claim = schema.volume, schema.claim
    claimed = sa.exists().where(claim.c.vm_id == volume.c.vm_id, claim.c.host_id == host_id).correlate(volume, _table)
    return (
        sa.exists()
        .where(volume.c.base_image_id == image_id, volume.c.pool_id == pool_id)
        .where(sa.or_(volume.c.deleted_at.is_(None), volume.c.observed_state != "absent"))
        .where(sa.or_(volume.c.host_id == host_id, claimed))
        .correlate(_table)
    )


def _source(session: Session, replicas: Sequence[ImageReplica]) -> tuple[str, str]:
    """Return (host, pool) of a ready replica on a host that is up; any host with the pool serves for a shared one."""
    host, pool_host = schema.host, schema.pool_host
    for replica in replicas:
        if replica.state != "ready":
            continue
        query = sa.select(host.c.id).where(host.c.deleted_at.is_(None), host.c.connectivity == "up").order_by(host.c.id)
        if replica.host_id:
            query = query.where(host.c.id == replica.host_id)
        else:
            query = query.join(
                pool_host, sa.and_(pool_host.c.host_id == host.c.id, pool_host.c.pool_id == replica.pool_id)
            ).where(pool_host.c.state == "ready")
        found = session.scalars(query.limit(1)).first()
        if found:
            return found, replica.pool_id
    return "", ""
