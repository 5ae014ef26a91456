"""Inserts that may meet a unique constraint, in one statement and without a savepoint: nothing is inserted, the caller says why."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session


def insert_unless_taken(
    session: Session, table: sa.Table, values: Mapping[str, Any], *, returning: Sequence[sa.ColumnElement[Any]] = ()
) -> sa.Row[Any] | None:
    """Insert a row and return these columns of it (the first column where none are named); None where a unique key is taken."""
    columns = tuple(returning) or (next(iter(table.c)),)
    statement = _statement(session.get_bind().dialect.name, table, columns)
    row: sa.Row[Any] | None = session.execute(statement, dict(values)).one_or_none()
    return row


@cache
def _statement(dialect: str, table: sa.Table, returning: tuple[sa.ColumnElement[Any], ...]) -> Any:
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(table).on_conflict_do_nothing().returning(*returning)
