"""What happens to volume rows and their space when a vm is placed, moved or erased."""

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core import layers
from trimtab_controller.core.model import MigrationRow, Pool, Volume
from trimtab_controller.core.pool_space import claim_limit_bytes
from trimtab_controller.store import claims, project_quota, schema
from trimtab_controller.store.among import among_asked
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import Conflict

_table = schema.volume

# What a volume that is gone lies over no longer.
_APART = {
    "parent_volume_id": None,
    "parent_layer_id": "",
    "layer_id": "",
    "merge_layer_id": None,
    "purge_after": None,
    "unit": "",
    "other_pool_id": None,
    "move_state": "",
}

_WRITE = _table.update().where(among_asked(_table.c.id, "volume_ids"))
_WRITE_ENCRYPTED = _WRITE.where(_table.c.is_encrypted)
_WRITE_NEXT_VERSION = _WRITE.values(version=_table.c.version + 1)


def bind(session: Session, volume_ids: Sequence[str], host_id: str) -> None:
    """Say on which host the volumes' bytes are (or will be made)."""
    if volume_ids:
        session.execute(_WRITE_NEXT_VERSION, {"volume_ids": list(volume_ids), "host_id": host_id})


def mark_present(session: Session, volume_ids: Sequence[str]) -> None:
    """Record that an agent proved the volumes to exist."""
    session.execute(_WRITE, {"volume_ids": list(volume_ids), "observed_state": "present"})
    # An encrypted one is a copy: its image was needed only to make it.
    session.execute(_WRITE_ENCRYPTED, {"volume_ids": list(volume_ids), "base_image_id": None})


def give_back_copies(session: Session, migration: MigrationRow) -> None:
    """Give back the target's space of a migration that did not take place."""
    claims.give_back_space(session, migration.copied_volume_ids, host_id=migration.target_host_id)


def move_home(session: Session, migration: MigrationRow) -> None:
    """After a migration with copies: the volumes live on the target, the source's space is free; whole copies lie over nothing."""
    if migration.copied_volume_ids:
        is_copied = _table.c.id.in_(migration.copied_volume_ids)
        copied = [build(Volume, row) for row in session.execute(sa.select(*columns_of(_table, Volume)).where(is_copied))]
        if layers.is_flattened(copied):
            session.execute(
                _table.update().where(is_copied).values(base_image_id=None, parent_volume_id=None, parent_layer_id="")
            )
    bind(session, migration.copied_volume_ids, migration.target_host_id)
    claims.give_back_space(session, migration.copied_volume_ids, host_id=migration.source_host_id)


def erase(session: Session, volumes: Sequence[Volume], *, now: datetime) -> None:
    """Free the space of volumes that are proven gone and leave their rows as tombstones."""
    ids = [volume.id for volume in volumes]
    claims.give_back_space(session, ids)
    session.execute(schema.volume_layer.delete().where(schema.volume_layer.c.volume_id.in_(ids)))
    # Whatever is left of their bytes anywhere is read by nobody from now on.
    session.execute(schema.volume_key.delete().where(schema.volume_key.c.volume_id.in_(ids)))
    session.execute(
        _table.update()
        .where(_table.c.id.in_(ids))
        .values(
            deleted_at=sa.func.coalesce(_table.c.deleted_at, now), observed_state="absent", vm_id=None, disk_index=None, **_APART
        )
    )


def detach(session: Session, volume_ids: Sequence[str]) -> None:
    """Take volumes off their vm; they and their space stay."""
    session.execute(
        _table.update()
        .where(_table.c.id.in_(volume_ids))
        .values(vm_id=None, disk_index=None, boot_order=0, version=_table.c.version + 1)
    )


# --- volumes apart from a vm -------------------------------------------------------------------------------------------------


def take_place(session: Session, volume: Volume, pool: Pool, host_id: str) -> bool:
    """Claim the volume's space, on `host_id` where the pool is local, and bind it there; False where there is no room.

    The bound is that of placement: capacity less the reserve, and no more than is available where others fill the file system.
    """
    if volume.unit:
        return True  # a LUN is there already, and takes room from nobody else
    place = schema.SHARED if pool.is_shared else host_id
    limit_bytes = limit_bytes_at(session, pool, place)
    if limit_bytes is None:
        return False
    try:
        claims.take_space(
            session,
            volume_id=volume.id,
            pool_id=pool.id,
            host_id=place,
            size_bytes=volume.size_bytes,
            limit_bytes=limit_bytes,
        )
    except claims.ClaimRefused:
        return False
    if not pool.is_shared:
        bind(session, [volume.id], host_id)
    return True


def take_present(session: Session, volume: Volume, pool: Pool, host_id: str) -> bool:
    """As `take_place`, for a file that is there already: what it takes of the file system is not counted against it again."""
    place = schema.SHARED if pool.is_shared else host_id
    table = schema.pool_space
    row = session.execute(sa.select(table).where(table.c.pool_id == pool.id, table.c.host_id == place)).one_or_none()
    if row is None:
        return False
    where = {"volume_id": volume.id, "pool_id": pool.id, "host_id": place}
    try:
        claims.take_space(session, **where, size_bytes=volume.size_bytes, limit_bytes=int(row.capacity_bytes))
    except claims.ClaimRefused:
        return False
    if not pool.is_shared:
        bind(session, [volume.id], host_id)
    return True


def room_bytes(session: Session, pool: Pool, host_id: str) -> int | None:
    """Return how much is free beside the reserve at a volume's place, as it was seen last; None where nobody has seen it."""
    table = schema.pool_space
    place = schema.SHARED if pool.is_shared else host_id
    row = session.execute(sa.select(table).where(table.c.pool_id == pool.id, table.c.host_id == place)).one_or_none()
    if row is None or row.observed_at is None:
        return None
    return int(row.available_bytes - row.capacity_bytes * pool.reserve_permille // 1000)


def limit_bytes_at(session: Session, pool: Pool, place: str) -> int | None:
    """Return how much may be claimed at a place of the pool; None where nobody has seen it."""
    table = schema.pool_space
    row = session.execute(sa.select(table).where(table.c.pool_id == pool.id, table.c.host_id == place)).one_or_none()
    if row is None:
        return None
    return claim_limit_bytes(
        capacity_bytes=int(row.capacity_bytes),
        available_bytes=int(row.available_bytes),
        claimed_bytes=int(row.claimed_bytes),
        written_bytes=row.written_bytes,
        reserve_permille=pool.reserve_permille,
    )


def grow(session: Session, volume: Volume, pool: Pool, size_bytes: int) -> bool:
    """Claim the volume's greater size and write it; False, and nothing is changed, where its place has no room.

    A volume that is nowhere yet claims nothing yet.
    """
    is_somewhere = pool.is_shared or bool(volume.host_id)
    limit_bytes = limit_bytes_at(session, pool, schema.SHARED if pool.is_shared else volume.host_id)
    if is_somewhere and limit_bytes is None:
        return False
    try:
        claims.resize_space(session, volume_id=volume.id, size_bytes=size_bytes, limit_bytes=limit_bytes or 0)
    except claims.ClaimRefused:
        return False
    session.execute(_WRITE_NEXT_VERSION, {"volume_ids": [volume.id], "size_bytes": size_bytes})
    return True


def set_size(session: Session, volume: Volume, size_bytes: int) -> None:
    """Write a smaller size and give back the rest of space and quota: of a volume that did not grow."""
    claims.resize_space(session, volume_id=volume.id, size_bytes=size_bytes, limit_bytes=0)
    session.execute(_WRITE_NEXT_VERSION, {"volume_ids": [volume.id], "size_bytes": size_bytes})
    project_quota.lower_used(session, volume.project_id, {"disk_bytes": volume.size_bytes - size_bytes})


def leave_place(session: Session, volume_id: str) -> None:
    """Give the space back and say that the volume is nowhere; nothing where it was nowhere."""
    claims.give_back_space(session, [volume_id])
    bind(session, [volume_id], "")


def release(session: Session, volume: Volume, *, now: datetime) -> None:
    """Free a live volume's name, space and quota and leave its row as a tombstone; released already: nothing."""
    gone = session.execute(_table.update().where(_table.c.id == volume.id, _table.c.deleted_at.is_(None)).values(deleted_at=now))
    if getattr(gone, "rowcount", 0) == 1:
        free(session, volume, now=now)


def free(session: Session, volume: Volume, *, now: datetime) -> None:
    """Give back the space and quota of a volume that is hidden already. Once: the caller's journal sees to it."""
    erase(session, [volume], now=now)
    table = schema.project
    session.execute(
        table.update().where(table.c.id == volume.project_id).values(disk_bytes_used=table.c.disk_bytes_used - volume.size_bytes)
    )


def show_again(session: Session, volume_id: str) -> None:
    session.execute(_WRITE_NEXT_VERSION, {"volume_ids": [volume_id], "deleted_at": None, "purge_after": None})


def to_purge(session: Session, now: datetime, *, limit: int) -> tuple[Volume, ...]:
    """Return the volumes that were deleted for longer than their grace."""
    query = sa.select(*columns_of(_table, Volume)).where(_table.c.purge_after <= now).limit(limit)
    return tuple(build(Volume, row) for row in session.execute(query))


def hide_unattached(session: Session, volume_id: str, *, now: datetime, purge_after: datetime) -> None:
    """Hide a volume unless a vm has it, until it is purged. Conflict(`volume-attached`); hidden already is fine."""
    row = session.execute(sa.select(_table.c.vm_id, _table.c.deleted_at).where(_table.c.id == volume_id)).one()
    changed = session.execute(
        _table.update()
        .where(_table.c.id == volume_id, _table.c.vm_id.is_(None), _table.c.deleted_at.is_(None))
        .values(deleted_at=now, version=_table.c.version + 1)
    )
    if getattr(changed, "rowcount", 0) != 1 and row.deleted_at is None:
        raise Conflict("volume-attached", "a vm has the volume; delete the vm first", vm_id=row.vm_id)
    # Also where the previous release's code hid it, which had no grace.
    session.execute(_WRITE, {"volume_ids": [volume_id], "purge_after": purge_after})


def hidden_on(session: Session, host_id: str) -> tuple[Volume, ...]:
    """Return the volumes on a host's local pools that were deleted and not purged yet."""
    query = sa.select(*columns_of(_table, Volume)).where(_table.c.host_id == host_id, _table.c.purge_after.is_not(None))
    return tuple(build(Volume, row) for row in session.execute(query))


def apart_on(session: Session, host_id: str) -> tuple[Volume, ...]:
    """Return the live volumes on a host's local pools that belong to no vm."""
    query = sa.select(*columns_of(_table, Volume)).where(
        _table.c.host_id == host_id, _table.c.vm_id.is_(None), _table.c.deleted_at.is_(None)
    )
    return tuple(build(Volume, row) for row in session.execute(query))
