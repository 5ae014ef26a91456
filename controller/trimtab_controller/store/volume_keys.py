"""Sealed keys of encrypted volumes."""

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema

_table, _volume = schema.volume_key, schema.volume
_OF_SUBJECT = (
    sa.select(_table.c.volume_id, _table.c.sealed_key)
    .join(_volume, _volume.c.id == _table.c.volume_id)
    .where(sa.or_(_volume.c.id == sa.bindparam("subject_id"), _volume.c.vm_id == sa.bindparam("subject_id")))
)


def insert(session: Session, volume_id: str, sealed_key: str, *, now: datetime) -> None:
    session.execute(_table.insert().values(volume_id=volume_id, sealed_key=sealed_key, created_at=now))


def of_subject(session: Session, subject_id: str) -> dict[str, str]:
    """Return volume -> sealed key of a vm's encrypted volumes, or of the one volume with this id: what a command about it may need."""
    return {row.volume_id: row.sealed_key for row in session.execute(_OF_SUBJECT, {"subject_id": subject_id})}
