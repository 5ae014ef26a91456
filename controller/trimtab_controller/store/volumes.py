"""Volumes in SQL: rows, lists, attachment at creation."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Volume, VolumeSummary
from trimtab_controller.store import keyset, lookup, schema
from trimtab_controller.store.among import among_asked
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DiskBus

_table = schema.volume

_OF_VMS = (
    sa.select(*(_table.c[name] for name in VolumeSummary._fields))
    .where(among_asked(_table.c.vm_id, "vm_ids"))
    .order_by(_table.c.disk_index)
)

FILTERS: keyset.Filters = {
    "name": keyset.equals(_table.c.name),
    "vm": keyset.named(_table.c.vm_id, schema.vm),
    "pool": keyset.named(_table.c.pool_id, schema.pool),
    "image": keyset.named(_table.c.base_image_id, schema.image),
    "state": keyset.equals(_table.c.observed_state),
}


def insert(session: Session, *, volume_id: str, now: datetime, **values: Any) -> Volume:
    """Insert a volume row from column values. AlreadyExists where its name is taken in the project."""
    return lookup.insert_named(session, _table, Volume, "volume", id=volume_id, created_at=now, **values)


def find(session: Session, project_id: str, name_or_id: str) -> Volume | None:
    return lookup.find(session, _table, Volume, name_or_id, project_ids=(project_id,))


def tie_to_vm(session: Session, volume_ids: Sequence[str]) -> None:
    """Let the volumes end with the vm that has them."""
    session.execute(_table.update().where(_table.c.id.in_(volume_ids)).values(is_deleted_with_vm=True))


def holds_bytes() -> sa.ColumnElement[bool]:
    """Return the condition that a volume is live, or deleted and not purged yet."""
    return sa.or_(_table.c.deleted_at.is_(None), _table.c.purge_after.is_not(None))


def find_deleted(session: Session, project_id: str, name_or_id: str) -> Volume | None:
    """Return the volume of this name or id that was deleted last and is not purged."""
    query = (
        sa.select(*columns_of(_table, Volume))
        .where(
            _table.c.project_id == project_id,
            _table.c.purge_after.is_not(None),
            sa.or_(_table.c.name == name_or_id, _table.c.id == name_or_id),
        )
        .order_by(_table.c.deleted_at.desc())
        .limit(1)
    )
    row = session.execute(query).one_or_none()
    return build(Volume, row) if row else None


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[Volume, ...], tuple[str, str] | None]:
    query = sa.select(*columns_of(_table, Volume)).where(_table.c.deleted_at.is_(None), _table.c.project_id == project_id)
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(Volume, row) for row in found.rows), found.next_after


def in_pool(session: Session, pool_id: str) -> tuple[Volume, ...]:
    """Return the live volumes in the pool."""
    query = sa.select(*columns_of(_table, Volume)).where(_table.c.pool_id == pool_id, _table.c.deleted_at.is_(None))
    return tuple(build(Volume, row) for row in session.execute(query.order_by(_table.c.id)))


def of_unit(session: Session, pool_id: str, unit: str) -> Volume | None:
    """Return the volume that has this number in the pool."""
    row = session.execute(
        sa.select(*columns_of(_table, Volume)).where(_table.c.pool_id == pool_id, _table.c.unit == unit)
    ).one_or_none()
    return build(Volume, row) if row else None


def of_vms(session: Session, vm_ids: Sequence[str]) -> dict[str, tuple[VolumeSummary, ...]]:
    """Return each vm's disks in order; one query."""
    found: dict[str, list[VolumeSummary]] = {vm_id: [] for vm_id in vm_ids}
    for disk in map(VolumeSummary._make, session.execute(_OF_VMS, {"vm_ids": list(vm_ids)})):
        found[disk.vm_id].append(disk)
    return {vm_id: tuple(volumes) for vm_id, volumes in found.items()}


def attach(
    session: Session, volume_id: str, *, vm_id: str, disk_index: int, boot_order: int, bus: DiskBus = DiskBus.VIRTIO
) -> Volume:
    """Attach a free volume that outlives the vm, and return it. Conflict where somebody took it meanwhile."""
    changed = session.execute(
        _table.update()
        .where(_table.c.id == volume_id, _table.c.vm_id.is_(None), _table.c.deleted_at.is_(None))
        .values(
            vm_id=vm_id,
            disk_index=disk_index,
            boot_order=boot_order,
            bus=bus.value,
            is_deleted_with_vm=False,
            version=_table.c.version + 1,
        )
        .returning(*columns_of(_table, Volume))
    ).one_or_none()
    if changed is None:
        raise Conflict("volume-attached", "the volume was attached to another vm meanwhile")
    return build(Volume, changed)


def take_over(session: Session, volume_id: str, old: Volume, *, vm_id: str) -> None:
    """Attach a volume to the vm in the place of another one, which was detached."""
    session.execute(
        _table.update()
        .where(_table.c.id == volume_id)
        .values(
            vm_id=vm_id,
            disk_index=old.disk_index,
            boot_order=old.boot_order,
            bus=old.bus.value,
            is_deleted_with_vm=old.is_deleted_with_vm,
            iops_limit=old.iops_limit,
            bandwidth_limit_mib_s=old.bandwidth_limit_mib_s,
            version=_table.c.version + 1,
        )
    )


def set_filling(session: Session, volume_id: str, *, backup_id: str, disk: str) -> None:
    """Record that the volume still reads from a disk of a backup, or with "" that it stands alone."""
    values = {"fill_backup_id": backup_id, "fill_disk": disk, "version": _table.c.version + 1}
    session.execute(_table.update().where(_table.c.id == volume_id).values(values))


def that_fill(session: Session, *, vm_id: str = "", backup_id: str = "") -> tuple[Volume, ...]:
    """Return the volumes that still read from a backup: all, or those of a vm, or those that read from this one."""
    query = sa.select(*columns_of(_table, Volume)).where(_table.c.fill_backup_id != "", holds_bytes()).order_by(_table.c.id)
    if vm_id:
        query = query.where(_table.c.vm_id == vm_id)
    if backup_id:
        query = query.where(_table.c.fill_backup_id == backup_id)
    return tuple(build(Volume, row) for row in session.execute(query))


def set_half_written(session: Session, volume_ids: Sequence[str]) -> None:
    """Record that a backup is being written over these: what they hold is nothing until it is whole, and nobody's checkpoint of it."""
    values = {"observed_state": "unknown", "generation": _table.c.generation + 1, "version": _table.c.version + 1}
    session.execute(_table.update().where(_table.c.id.in_(volume_ids)).values(values))


def half_written(session: Session, vm_id: str) -> tuple[str, ...]:
    """Return the names of the vm's volumes that a backup was written over in part. Plan: uq_volume_vm_disk."""
    query = sa.select(_table.c.name).where(_table.c.vm_id == vm_id, _table.c.observed_state == "unknown")
    return tuple(session.scalars(query.order_by(_table.c.disk_index)))


def rename(session: Session, volume_id: str, name: str) -> None:
    """Give a volume a name that is free."""
    session.execute(_table.update().where(_table.c.id == volume_id).values(name=name, version=_table.c.version + 1))


def set_limits(session: Session, volume_id: str, *, iops: int, bandwidth_mib_s: int) -> None:
    """Write how fast a guest may use the volume; 0: as fast as the pool."""
    values = {"iops_limit": iops, "bandwidth_limit_mib_s": bandwidth_mib_s, "version": _table.c.version + 1}
    session.execute(_table.update().where(_table.c.id == volume_id).values(values))


def check_version(session: Session, volume_id: str, expected_version: int | None) -> None:
    """Raise the version; Conflict `stale-etag` where it is not the expected one."""
    lookup.update_version(session, _table, "the volume", volume_id, expected_version=expected_version)
