"""Where images are."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Image, ImageReplica, Pool
from trimtab_controller.store import describe, schema
from trimtab_controller.store.rows import build, columns_of

_table = schema.image_replica


@dataclass(frozen=True, slots=True)
class Missing:
    """An image that has to come to a pool, and a replica to read from ("" when no host that is up has one)."""

    image: Image
    pool: Pool
    source_host_id: str
    source_pool: Pool


def of_image(session: Session, image_id: str) -> tuple[ImageReplica, ...]:
    rows = session.execute(sa.select(*columns_of(_table, ImageReplica)).where(_table.c.image_id == image_id))
    return tuple(build(ImageReplica, row) for row in rows)


def missing_for_vm(session: Session, vm_id: str, host_id: str) -> tuple[Missing, ...]:
    """Return the base images of the vm's volumes that are not yet where the volumes will be on `host_id`."""
    parts = describe.read_vm(session, vm_id)
    missing = []
    for image_id, pool_id in sorted({(v.base_image_id, v.pool_id) for v in parts.volumes if v.base_image_id}):
        pool = parts.pools[pool_id]
        place = "" if pool.is_shared else host_id
        replicas = of_image(session, image_id)
        if any(one.pool_id == pool_id and one.host_id == place and one.state == "ready" for one in replicas):
            continue
        source_host_id, source_pool_id = _source(session, replicas)
        source_pool = describe.get_pool(session, source_pool_id) if source_pool_id else pool
        missing.append(Missing(parts.images[image_id], pool, source_host_id, source_pool))
    return tuple(missing)


def record_for_vm(session: Session, vm_id: str, host_id: str, *, now: datetime) -> None:
    """Record the replicas that `missing_for_vm` named, now that they are there."""
    for missing in missing_for_vm(session, vm_id, host_id):
        place = "" if missing.pool.is_shared else host_id
        add(session, image_id=missing.image.id, pool_id=missing.pool.id, host_id=place, now=now)


def add(session: Session, *, image_id: str, pool_id: str, host_id: str, now: datetime) -> None:
    """Record a ready replica; recording it twice is fine."""
    key = (_table.c.image_id == image_id, _table.c.pool_id == pool_id, _table.c.host_id == host_id)
    changed = session.execute(_table.update().where(*key).values(state="ready", owner_operation_id=""))
    if getattr(changed, "rowcount", 0) == 0:
        session.execute(
            _table.insert().values(image_id=image_id, pool_id=pool_id, host_id=host_id, state="ready", created_at=now)
        )


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
