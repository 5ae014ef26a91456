"""Backups in SQL: a view of what the repositories hold, with what was proven of each."""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Backup
from trimtab_controller.store import keyset, schema
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import NotFound

_table = schema.backup
_columns = columns_of(_table, Backup)

# States in which the repository lists it.
LISTED = ("ready", "damaged")

FILTERS: keyset.Filters = {
    "vm": lambda value: sa.or_(_table.c.vm_name == value, _table.c.vm_id == value),
    "repo": keyset.named(_table.c.repo_id, schema.backup_repo),
    "state": keyset.equals(_table.c.state),
}


def insert(session: Session, **values: Any) -> Backup:
    return build(Backup, session.execute(_table.insert().returning(*_columns), values).one())


def get(session: Session, backup_id: str) -> Backup:
    """Return the backup, deleted ones too. NotFound."""
    row = session.execute(sa.select(*_columns).where(_table.c.id == backup_id)).one_or_none()
    if row is None:
        raise NotFound("backup-not-found", f"there is no backup {backup_id}; `trimtab backup list` shows them", backup=backup_id)
    return build(Backup, row)


def exists(session: Session, backup_id: str) -> bool:
    """Tell whether there is a row, deleted ones too."""
    return session.execute(sa.select(_table.c.id).where(_table.c.id == backup_id)).one_or_none() is not None


def find(session: Session, project_id: str, backup_id: str) -> Backup | None:
    """Return the live backup of the project, by its id or by the end of it, where that names one."""
    tail = backup_id.removeprefix("bk-")
    query = sa.select(*_columns).where(
        _table.c.project_id == project_id,
        _table.c.deleted_at.is_(None),
        sa.or_(_table.c.id == backup_id, _table.c.id.endswith(tail, autoescape=True) if len(tail) >= 4 else sa.false()),
    )
    rows = session.execute(query.limit(2)).all()
    return build(Backup, rows[0]) if len(rows) == 1 else None


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[Backup, ...], tuple[str, str] | None]:
    query = sa.select(*_columns).where(_table.c.deleted_at.is_(None), _table.c.project_id == project_id)
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(Backup, row) for row in found.rows), found.next_after


def of_repo(session: Session, repo_id: str) -> tuple[Backup, ...]:
    """Return every live row of the repository, oldest first."""
    query = sa.select(*_columns).where(_table.c.repo_id == repo_id, _table.c.deleted_at.is_(None)).order_by(_table.c.id)
    return tuple(build(Backup, row) for row in session.execute(query))


def damaged(session: Session, repo_id: str) -> tuple[Backup, ...]:
    """Return the live backups of the repository that cannot be restored whole. Few or none."""
    query = sa.select(*_columns).where(_table.c.repo_id == repo_id, _table.c.state == "damaged", _table.c.deleted_at.is_(None))
    return tuple(build(Backup, row) for row in session.execute(query.order_by(_table.c.id)))


def last_taken(session: Session, repo_id: str) -> datetime | None:
    """Return when the newest live backup that is not damaged was taken."""
    query = sa.select(sa.func.max(_table.c.taken_at)).where(
        _table.c.repo_id == repo_id, _table.c.state == "ready", _table.c.deleted_at.is_(None)
    )
    taken_at: datetime | None = session.scalar(query)
    return taken_at


def of_vms(session: Session, vm_ids: Collection[str]) -> dict[str, list[Backup]]:
    """Return the listed backups of each of these vms, oldest first."""
    found: dict[str, list[Backup]] = {vm_id: [] for vm_id in vm_ids}
    query = (
        sa.select(*_columns)
        .where(_table.c.vm_id.in_(list(vm_ids)), _table.c.state.in_(LISTED), _table.c.deleted_at.is_(None))
        .order_by(_table.c.taken_at, _table.c.id)
    )
    for row in session.execute(query):
        found[row.vm_id].append(build(Backup, row))
    return found


def longest_unread(session: Session, *, read_before: datetime) -> Backup | None:
    """Return the listed backup of a ready repository whose reading back is longest ago, where that was before this instant."""
    repo = schema.backup_repo
    query = (
        sa.select(*_columns)
        .join(repo, repo.c.id == _table.c.repo_id)
        .where(_table.c.state.in_(LISTED), _table.c.deleted_at.is_(None), _table.c.verified_at < read_before)
        .where(repo.c.state == "ready", repo.c.deleted_at.is_(None))
        .order_by(_table.c.verified_at, _table.c.id)
        .limit(1)
    )
    row = session.execute(query).one_or_none()
    return build(Backup, row) if row is not None else None


def update(session: Session, backup_id: str, **values: Any) -> None:
    session.execute(_table.update().where(_table.c.id == backup_id).values(**values))


def hide(session: Session, backup_ids: Sequence[str], *, now: datetime) -> None:
    """Take rows off the list; the repository follows with the next prune."""
    session.execute(
        _table.update().where(_table.c.id.in_(list(backup_ids)), _table.c.deleted_at.is_(None)).values(deleted_at=now)
    )


def totals(session: Session) -> Mapping[str, tuple[int, int, int]]:
    """Return (listed backups, bytes of their disks, bytes that they added) by repository."""
    query = (
        sa.select(
            _table.c.repo_id,
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(_table.c.size_bytes), 0),
            sa.func.coalesce(sa.func.sum(_table.c.stored_bytes), 0),
        )
        .where(_table.c.state.in_(LISTED), _table.c.deleted_at.is_(None))
        .group_by(_table.c.repo_id)
    )
    return {row[0]: (int(row[1]), int(row[2]), int(row[3])) for row in session.execute(query)}


def delete_failed_before(session: Session, at: datetime, *, limit: int) -> int:
    """Delete rows of attempts that came to nothing; return how many."""
    old = session.scalars(
        sa.select(_table.c.id).where(_table.c.state == "failed", _table.c.created_at < at).order_by(_table.c.id).limit(limit)
    ).all()
    session.execute(_table.delete().where(_table.c.id.in_(old)))
    return len(old)
