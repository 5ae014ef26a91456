"""Where images are.

A replica's row is there before its file: `copying`, owned by the operation that brings it. Where that operation ended without
bringing it, the row stays, so that the image's deletion knows every place that may have a file; the next copy takes it over.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Image, ImageReplica, Pool, Volume
from trimtab_controller.store import describe, schema, vms
from trimtab_controller.store.rows import build, columns_of

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
    """Return the base images of the vm's volumes and the ISO in its drive that are not yet where they will be on `host_id`."""
    volumes = describe.volumes_of(session, vm_id)
    iso_id, home = vms.get(session, vm_id).cdrom_image_id, describe.state_volume(volumes)
    wanted = _bases(volumes) | ({(iso_id, home.pool_id)} if iso_id and home is not None else set())
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
    if session.execute(sa.select(_table.c.state).where(*key)).one_or_none() is None:
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
