"""The same statement for many rows, each row with values of its own.

SQLite is in our process: it runs a prepared statement once for each row. For PostgreSQL the rows go as one JSON document that one
statement joins; a statement for each took it longer than everything else about a placement together, pipelined or not. Rejected:
an array for each column, since the driver escapes JSON within arrays at a fifth of a millisecond for each decision.

The result is the same on both as long as no two rows of a call mean the same row of the table: a join changes a row once. Callers
add up what is for one row first. A condition is checked for each row on the row as it is when it is written, also when another
transaction changed it meanwhile.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

Asked = Mapping[str, sa.ColumnElement[Any]]
Row = Mapping[str, Any]
_ROWS = "rows"


def binds(types: Mapping[str, Any]) -> Asked:
    """Return what is asked as parameters of these types: of one row."""
    return {name: sa.bindparam(name, type_=type_) for name, type_ in types.items()}


class ManyUpdate:
    """An UPDATE whose conditions and values take something from each row."""

    def __init__(self, types: Mapping[str, Any], build: Callable[[Asked], sa.Update]) -> None:
        """`build` gets what is asked by name, of these types, and returns the statement."""
        self._each = build(binds(types))
        self._joined = build(_recordset(types))

    def run(self, session: Session, rows: Sequence[Row]) -> int:
        """Return how many rows were changed."""
        if not rows:
            return 0
        connection = session.connection()
        if connection.dialect.name == "sqlite":
            return connection.execute(self._each, list(rows)).rowcount
        return connection.execute(self._joined, {_ROWS: _document(rows)}).rowcount


class ManyInsert:
    """An INSERT of whole rows: these columns are given, the others have what the table says."""

    def __init__(self, table: sa.Table, names: Sequence[str]) -> None:
        self._each = table.insert()
        asked = _recordset({name: table.c[name].type for name in names})
        self._joined = table.insert().from_select(list(names), sa.select(*(asked[name] for name in names)))

    def run(self, session: Session, rows: Sequence[Row]) -> None:
        if not rows:
            return
        connection = session.connection()
        if connection.dialect.name == "sqlite":
            connection.execute(self._each, list(rows))
        else:
            connection.execute(self._joined, {_ROWS: _document(rows)})


def _recordset(types: Mapping[str, Any]) -> Asked:
    """Return the columns of the rows of the document."""
    columns = [sa.column(name, type_) for name, type_ in types.items()]
    document = sa.bindparam(_ROWS, type_=postgresql.JSONB())
    asked = sa.func.jsonb_to_recordset(document).table_valued(*columns, name="asked").render_derived(with_types=True)
    return {name: asked.c[name] for name in types}


def _document(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()} for row in rows]
