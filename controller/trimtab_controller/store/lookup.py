"""Finds live rows by name or id, own ones before shared ones."""

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import AlreadyExists, Conflict

T = TypeVar("T")


def find(
    session: Session, table: sa.Table, target: type[T], name_or_id: str, *, project_ids: Sequence[str] | None = None
) -> T | None:
    """Return the live row of that name or id in one of the projects, the first project's before the others'."""
    query = (
        sa.select(*columns_of(table, target))
        .where(table.c.deleted_at.is_(None), sa.or_(table.c.name == name_or_id, table.c.id == name_or_id))
        .limit(1)
    )
    if project_ids is not None:
        query = query.where(table.c.project_id.in_(project_ids))
        query = query.order_by(sa.case({one: i for i, one in enumerate(project_ids)}, value=table.c.project_id))
    row = session.execute(query).first()
    return build(target, row) if row else None


def names(session: Session, table: sa.Table, ids: Collection[str | None]) -> dict[str, str]:
    """Return id -> name, of deleted rows too; one query."""
    wanted = {one for one in ids if one}
    if not wanted:
        return {}
    rows = session.execute(sa.select(table.c.id, table.c.name).where(table.c.id.in_(wanted)))
    return {row.id: row.name for row in rows}


def insert_named(session: Session, table: sa.Table, noun: str, **values: Any) -> None:
    """Insert a row whose name is unique among live ones. AlreadyExists where it is taken."""
    try:
        with session.begin_nested():
            session.execute(table.insert().values(**values))
    except IntegrityError as error:
        taken = sa.select(table.c.id).where(table.c.name == values["name"], table.c.deleted_at.is_(None))
        if "project_id" in table.c:
            taken = taken.where(table.c.project_id == values["project_id"])
        if session.execute(taken).first() is None:
            raise
        raise AlreadyExists(
            f"{noun.replace(' ', '-')}-exists",
            f"{noun} {values['name']} exists already; choose another name",
            name=values["name"],
        ) from error


def update_version(
    session: Session, table: sa.Table, noun: str, identifier: str, *, expected_version: int | None = None, **values: Any
) -> None:
    """Write column values and raise the version. Conflict `stale-etag` where the version is not the expected one."""
    query = table.update().where(table.c.id == identifier, table.c.deleted_at.is_(None))
    if expected_version is not None:
        query = query.where(table.c.version == expected_version)
    changed = session.execute(query.values(version=table.c.version + 1, **values))
    if getattr(changed, "rowcount", 0) != 1:
        raise Conflict("stale-etag", f"{noun} changed since you read it; read it again, then decide")
