"""What happens to volume rows and their space when a vm is placed, moved or erased."""

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import MigrationRow, Volume
from trimtab_controller.store import claims, schema

_table = schema.volume


def bind(session: Session, volume_ids: Sequence[str], host_id: str) -> None:
    """Say on which host the volumes' bytes are (or will be made)."""
    session.execute(_table.update().where(_table.c.id.in_(volume_ids)).values(host_id=host_id, version=_table.c.version + 1))


def mark_present(session: Session, volume_ids: Sequence[str]) -> None:
    """Record that an agent proved the volumes to exist."""
    session.execute(_table.update().where(_table.c.id.in_(volume_ids)).values(observed_state="present"))


def give_back_copies(session: Session, migration: MigrationRow) -> None:
    """Give back the target's space of a migration that did not take place."""
    claims.give_back_space(session, migration.copied_volume_ids, host_id=migration.target_host_id)


def move_home(session: Session, migration: MigrationRow) -> None:
    """After a migration with copies: the volumes live on the target, the source's space is free."""
    bind(session, migration.copied_volume_ids, migration.target_host_id)
    claims.give_back_space(session, migration.copied_volume_ids, host_id=migration.source_host_id)


def erase(session: Session, volumes: Sequence[Volume], *, now: datetime) -> None:
    """Free the space of volumes that are proven gone and leave their rows as tombstones."""
    ids = [volume.id for volume in volumes]
    claims.give_back_space(session, ids)
    session.execute(
        _table.update()
        .where(_table.c.id.in_(ids))
        .values(deleted_at=sa.func.coalesce(_table.c.deleted_at, now), observed_state="absent", vm_id=None, disk_index=None)
    )
