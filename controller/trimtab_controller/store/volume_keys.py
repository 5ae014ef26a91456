"""Sealed keys of encrypted volumes, and sealed secrets of pools."""

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store import schema

_key, _secret, _volume = schema.volume_key, schema.pool_secret, schema.volume
_IS_OF_SUBJECT = sa.or_(_volume.c.id == sa.bindparam("subject_id"), _volume.c.vm_id == sa.bindparam("subject_id"))
_KEYS = sa.select(_key.c.volume_id, _key.c.sealed_key).join(_volume, _volume.c.id == _key.c.volume_id).where(_IS_OF_SUBJECT)
_SECRETS = sa.select(_secret.c.pool_id, _secret.c.sealed_secret).where(
    sa.or_(
        _secret.c.pool_id == sa.bindparam("subject_id"),
        _secret.c.pool_id.in_(sa.select(_volume.c.pool_id).where(_IS_OF_SUBJECT)),
    )
)


def insert(session: Session, volume_id: str, sealed_key: str, *, now: datetime) -> None:
    session.execute(_key.insert().values(volume_id=volume_id, sealed_key=sealed_key, created_at=now))


def insert_pool_secret(session: Session, pool_id: str, sealed_secret: str, *, now: datetime) -> None:
    session.execute(_secret.insert().values(pool_id=pool_id, sealed_secret=sealed_secret, created_at=now))


def of_subject(session: Session, subject_id: str) -> dict[str, str]:
    """Return volume or pool -> what is sealed for it: the keys of a vm's volumes, or of the one volume with this id, and the secrets of
    the pools that they are in, or of the one pool with this id. That is what a command about the subject may need."""
    asked = {"subject_id": subject_id}
    keys = {row.volume_id: row.sealed_key for row in session.execute(_KEYS, asked)}
    return keys | {row.pool_id: row.sealed_secret for row in session.execute(_SECRETS, asked)}
