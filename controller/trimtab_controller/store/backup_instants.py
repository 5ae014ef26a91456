"""Backups of several vms at one instant, in SQL."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import BackupInstant
from trimtab_controller.store import keyset, schema
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import NotFound

_table = schema.backup_instant
_columns = columns_of(_table, BackupInstant)
FILTERS: keyset.Filters = {"name": keyset.equals(_table.c.name), "state": keyset.equals(_table.c.state)}


def insert(session: Session, **values: Any) -> BackupInstant:
    return build(BackupInstant, session.execute(_table.insert().returning(*_columns), values).one())


def get(session: Session, instant_id: str) -> BackupInstant:
    """Return the instant, deleted ones too. NotFound."""
    row = session.execute(sa.select(*_columns).where(_table.c.id == instant_id)).one_or_none()
    if row is None:
        raise NotFound("backup-instant-not-found", f"there is no backup instant {instant_id}", instant=instant_id)
    return build(BackupInstant, row)


def find(session: Session, project_id: str, name_or_id: str) -> BackupInstant | None:
    """Return the project's live instant of this id, or the newest of this name."""
    query = sa.select(*_columns).where(
        _table.c.project_id == project_id,
        _table.c.deleted_at.is_(None),
        sa.or_(_table.c.id == name_or_id, _table.c.name == name_or_id),
    )
    row = session.execute(query.order_by(_table.c.created_at.desc(), _table.c.id.desc()).limit(1)).one_or_none()
    return build(BackupInstant, row) if row else None


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[BackupInstant, ...], tuple[str, str] | None]:
    query = sa.select(*_columns).where(_table.c.deleted_at.is_(None), _table.c.project_id == project_id)
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(BackupInstant, row) for row in found.rows), found.next_after


def update(session: Session, instant_id: str, **values: Any) -> None:
    session.execute(_table.update().where(_table.c.id == instant_id).values(**values))
