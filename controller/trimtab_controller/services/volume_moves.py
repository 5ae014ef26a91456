"""Moves a volume to another pool, and plans to empty one."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Actor, Operation, Project
from trimtab_controller.operations.move_accept import accept_move
from trimtab_controller.services import pools, volumes
from trimtab_controller.store import volumes as volume_store


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveWish:
    to_pool: str
    # 0: as fast as the storage.
    bandwidth_mib_s: int = 0


def move(
    session: Session,
    name_or_id: str,
    wish: MoveWish,
    *,
    project: Project,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> Operation:
    """Accept the move: the space in the new pool is claimed at once, that in the former one until the volume has left it."""
    volume, pool = volumes.find(session, name_or_id, project=project), pools.find(session, wish.to_pool)
    volume_store.check_version(session, volume.id, expected_version)
    return accept_move(session, volume, pool, bandwidth_mib_s=wish.bandwidth_mib_s, actor=actor, now=now)
