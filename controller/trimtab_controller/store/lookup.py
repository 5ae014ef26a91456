"""Finds live rows by name or id, own ones before shared ones."""

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store.among import among_asked
from trimtab_controller.store.inserts import insert_unless_taken
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import AlreadyExists, Conflict

T = TypeVar("T")


def find(
    session: Session, table: sa.Table, target: type[T], name_or_id: str, *, project_ids: Sequence[str] | None = None
) -> T | None:
    """Return the live row of that name or id in one of the projects, the first project's before the others'."""
    owners = {f"project_{i}": one for i, one in enumerate(project_ids)} if project_ids is not None else {}
    query = _live(table, cast(Any, target), project_ids is not None, tuple(owners))
    row = session.execute(query, {"wanted": name_or_id, **owners}).first()
    return build(target, row) if row else None


@cache
def _live(table: sa.Table, target: Any, is_owned: bool, owners: tuple[str, ...]) -> sa.Select[Any]:
    """Return the query of `find` with a parameter for each project, named by `owners`."""
    wanted: sa.BindParameter[str] = sa.bindparam("wanted")
    query = (
        sa.select(*columns_of(table, target))
        .where(table.c.deleted_at.is_(None), sa.or_(table.c.name == wanted, table.c.id == wanted))
        .limit(1)
    )
    if not is_owned:
        return query
    ranks = [(table.c.project_id == sa.bindparam(owner), rank) for rank, owner in enumerate(owners)]
    return query.where(sa.or_(*(is_owner for is_owner, _rank in ranks))).order_by(sa.case(*ranks))


def names(session: Session, table: sa.Table, ids: Collection[str | None]) -> dict[str, str]:
    """Return id -> name, of deleted rows too; one query."""
    return names_in(session, {table: ids})


def names_in(session: Session, wanted: Mapping[sa.Table, Collection[str | None]]) -> dict[str, str]:
    """Return id -> name over several tables, of deleted rows too; one query."""
    known = {table: [one for one in set(ids) if one] for table, ids in wanted.items()}
    asked = tuple(table for table, ids in known.items() if ids)
    if not asked:
        return {}
    return {row.id: row.name for row in session.execute(_names_of(asked), {f"of_{table.name}": known[table] for table in asked})}


@cache
def _names_of(tables: tuple[sa.Table, ...]) -> Any:
    """Return the query of `names_in`, with a parameter for each table."""
    queries = [sa.select(one.c.id, one.c.name).where(among_asked(one.c.id, f"of_{one.name}")) for one in tables]
    return queries[0] if len(queries) == 1 else sa.union_all(*queries)


def insert_named(session: Session, table: sa.Table, target: type[T], noun: str, **values: Any) -> T:
    """Insert a row whose name is unique among live ones and return it. AlreadyExists where the name is taken."""
    row = insert_unless_taken(session, table, values, returning=columns_of(table, target))
    if row is None:
        raise AlreadyExists(
            f"{noun.replace(' ', '-')}-exists",
            f"{noun} {values['name']} exists already; choose another name",
            name=values["name"],
        )
    return build(target, row)


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
