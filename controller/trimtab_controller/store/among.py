"""`among(column, ids)`: a condition on many ids that is one parameter.

With a parameter for each id, SQLAlchemy writes the statement anew for each number of them and PostgreSQL's driver reads all of it:
for 500 vms longer than the server takes to answer.
"""

import json
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class _Texts(sa.types.TypeDecorator[Collection[str]]):
    """Many strings as one value: an array, on SQLite a JSON document."""

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        return dialect.type_descriptor(sa.Text() if dialect.name == "sqlite" else postgresql.ARRAY(sa.Text()))

    def process_bind_param(self, value: Collection[str] | None, dialect: sa.Dialect) -> Any:
        texts = list(value or ())
        return json.dumps(texts) if dialect.name == "sqlite" else texts


class _Among(FunctionElement[bool]):
    type = sa.Boolean()
    inherit_cache = True
    name = "among"

    def self_group(self, against: Any = None) -> "_Among":
        """Stand as it is among other conditions: `... = 1` around it, for want of a boolean, keeps SQLite from the column's index."""
        del against
        return self


def among(column: sa.ColumnElement[str], ids: Collection[str]) -> sa.ColumnElement[bool]:
    """Return whether the column is one of these, of which there may be any number."""
    return _Among(column, sa.literal(ids, _Texts()))


def among_asked(column: sa.ColumnElement[str], name: str) -> sa.ColumnElement[bool]:
    """Return whether the column is one of those that a statement is executed with under this name."""
    return _Among(column, sa.bindparam(name, type_=_Texts()))


@compiles(_Among)
def _as_array(element: _Among, compiler: Any, **options: Any) -> str:
    column, ids = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} = ANY ({ids})"


@compiles(_Among, "sqlite")
def _as_document(element: _Among, compiler: Any, **options: Any) -> str:
    column, ids = (compiler.process(each, **options) for each in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({ids}))"  # noqa: S608 made of compiled parts
