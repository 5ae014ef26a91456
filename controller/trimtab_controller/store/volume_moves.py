"""Volumes that move between pools, in SQL: both places are claimed until one is proven gone.

    '' ── begin ──► going ── record (the volume is there) ──► left ── finish (nothing is at the former place) ──► ''
                     └──── give_up (nothing is at the new place) ────► ''

While it is `going` the row names the former place, and where the volume is says the file there (`kvm/move_files.py`).
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Pool, Volume
from trimtab_controller.store import claims, schema, volume_claims
from trimtab_controller.store.describe import get_volume
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DiskFormat

GOING, LEFT = "going", "left"
_table = schema.volume
_NOWHERE = {"other_pool_id": None, "other_host_id": "", "other_format": "", "move_state": ""}


def begin(session: Session, volume: Volume, pool: Pool, host_id: str, format: DiskFormat) -> bool:
    """Claim the space at the place where the volume shall be, and note that place; False where there is no room."""
    place = schema.SHARED if pool.is_shared else host_id
    limit_bytes = volume_claims.limit_bytes_at(session, pool, place)
    if limit_bytes is None:
        return False
    size = volume.size_bytes
    try:
        claims.take_space(session, volume_id=volume.id, pool_id=pool.id, host_id=place, size_bytes=size, limit_bytes=limit_bytes)
    except claims.ClaimRefused:
        return False
    _write(session, volume, other_pool_id=pool.id, other_host_id=place, other_format=format.value, move_state=GOING)
    return True


def give_up(session: Session, volume_id: str) -> None:
    """The volume stays where it is and nothing of it is elsewhere; nothing where it does not move."""
    volume = get_volume(session, volume_id)
    if volume.move_state == GOING:
        _release(session, volume)


def record(session: Session, volume_id: str) -> None:
    """The volume is at its new place, by itself; done already: nothing. What it has left is claimed still."""
    volume = get_volume(session, volume_id)
    if volume.move_state != GOING:
        return
    _write(
        session,
        volume,
        pool_id=volume.other_pool_id,
        host_id=volume.other_host_id,
        format=volume.other_format,
        other_pool_id=volume.pool_id,
        other_host_id=volume.host_id,
        other_format=volume.format.value,
        move_state=LEFT,
        base_image_id=None,
        parent_volume_id=None,
        parent_layer_id="",
        layer_id="",
        generation=volume.generation + 1,
    )


def finish(session: Session, volume_id: str) -> None:
    """Nothing is left at the former place; done already: nothing."""
    volume = get_volume(session, volume_id)
    if volume.move_state == LEFT:
        _release(session, volume)


def unsettled(session: Session, *, limit: int) -> tuple[Volume, ...]:
    """Return the volumes that move while no operation sees to it: whatever did was superseded."""
    operation = schema.operation
    subject = sa.func.coalesce(_table.c.vm_id, _table.c.id)
    is_worked_on = sa.select(operation.c.id).where(operation.c.subject_id == subject, operation.c.ended_at.is_(None)).exists()
    query = sa.select(*columns_of(_table, Volume)).where(_table.c.move_state != "", ~is_worked_on).limit(limit)
    return tuple(build(Volume, row) for row in session.execute(query))


def require_settled(session: Session, subject_id: str, subject_name: str) -> None:
    """Raise Conflict where a volume of the vm, or the volume itself, moves: a move that was cut off is looked at within seconds."""
    found = session.scalars(
        sa.select(_table.c.name).where(sa.or_(_table.c.vm_id == subject_id, _table.c.id == subject_id), _table.c.move_state != "")
    ).all()
    if found:
        raise Conflict(
            "volume-moving",
            f"{subject_name}: a move of volume {', '.join(sorted(found))} was cut off and is being cleaned up; try again in a moment",
        )


def _release(session: Session, volume: Volume) -> None:
    claims.give_back_space(session, [volume.id], pool_id=volume.other_pool_id, host_id=volume.other_host_id)
    _write(session, volume, **_NOWHERE)


def _write(session: Session, volume: Volume, **values: Any) -> None:
    session.execute(_table.update().where(_table.c.id == volume.id).values(version=_table.c.version + 1, **values))
