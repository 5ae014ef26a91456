"""Inserts that may meet a unique constraint, in one statement and without a savepoint: nothing is inserted, the caller says why."""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session


def insert_unless_taken(
    session: Session, table: sa.Table, values: Mapping[str, Any], *, returning: Sequence[sa.ColumnElement[Any]] = ()
) -> sa.Row[Any] | None:
    """Insert a row and return these columns of it (the first column where none are named); None where a unique key is taken."""
    columns: list[Any] = list(returning) or [next(iter(table.c))]
    statement: Any
    if session.get_bind().dialect.name == "postgresql":
        statement = postgresql.insert(table).values(**values).on_conflict_do_nothing()
    else:
        statement = sqlite.insert(table).values(**values).on_conflict_do_nothing()
    row: sa.Row[Any] | None = session.execute(statement.returning(*columns)).one_or_none()
    return row
