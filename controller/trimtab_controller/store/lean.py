"""Runs statements that are built once and executed often straight on the SQLite driver.

SQLAlchemy compiles a statement once and then spends three times as long on each execution as SQLite does: a cache key of the whole
statement, a context, a result with its metadata, events. What is left here is what makes a difference to a caller: types of
parameters and columns, and the errors. A statement object that comes for the second time is prepared; one that is built anew for each
execution never does and takes SQLAlchemy's way, as do those that need more (lists of parameters, defaults computed in Python).
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import DBAPIError, MultipleResultsFound, NoResultFound

from trimtab_controller.store.schema.base import UtcDateTime

Parameters = Mapping[str, Any]
_Convert = Callable[[Any], Any]


class LeanResult:
    """The rows of one execution, all of them read. What callers use of SQLAlchemy's result."""

    __slots__ = ("_rows", "rowcount")

    def __init__(self, rows: list[Any], rowcount: int) -> None:
        self._rows = rows
        self.rowcount = rowcount

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def all(self) -> list[Any]:
        return self._rows

    def first(self) -> Any:
        return self._rows[0] if self._rows else None

    def one_or_none(self) -> Any:
        if len(self._rows) > 1:
            raise MultipleResultsFound("Multiple rows were found when one or none was required")
        return self.first()

    def one(self) -> Any:
        row = self.one_or_none()
        if row is None:
            raise NoResultFound("No row was found when one was required")
        return row

    def scalar(self) -> Any:
        return self._rows[0][0] if self._rows else None

    def scalar_one_or_none(self) -> Any:
        row = self.one_or_none()
        return None if row is None else row[0]

    def scalar_one(self) -> Any:
        return self.one()[0]

    def scalars(self) -> "LeanResult":
        return LeanResult([row[0] for row in self._rows], self.rowcount)


class Prepared:
    """A statement compiled for one set of parameter names."""

    __slots__ = ("_converts", "_dialect", "_parameters", "_row", "_text")

    def __init__(self, compiled: Any, dialect: Dialect, names: tuple[str, ...]) -> None:
        """`compiled`: one for which `is_plain` holds."""
        self._text: str = compiled.string
        self._dialect = dialect
        self._parameters = [_parameter(compiled, place, names) for place in compiled.positiontup]
        has_rows = compiled.effective_returning or isinstance(compiled.statement, sa.Select | sa.CompoundSelect)
        columns = compiled._result_columns if has_rows else ()
        converts = [(i, _result_convert(column.type, dialect)) for i, column in enumerate(columns)]
        self._converts: list[tuple[int, _Convert]] = [(i, convert) for i, convert in converts if convert is not None]
        self._row = _row_class(tuple(str(column.keyname) for column in columns)) if columns else None

    def run(self, driver: Any, parameters: Parameters) -> LeanResult:
        given = [
            constant if name is None else parameters[name] if convert is None else convert(parameters[name])
            for name, constant, convert in self._parameters
        ]
        try:
            cursor = driver.execute(self._text, given)
            found = cursor.fetchall() if self._row is not None else []
        except sqlite3.Error as error:
            raise DBAPIError.instance(self._text, given, error, sqlite3.Error, dialect=self._dialect) from error
        if self._row is None:
            return LeanResult([], cursor.rowcount)
        return LeanResult(
            [self._row(self._converted(row)) for row in found] if self._converts else list(map(self._row, found)), -1
        )

    def _converted(self, row: tuple[Any, ...]) -> list[Any]:
        values = list(row)
        for i, convert in self._converts:
            values[i] = convert(values[i])
        return values


class Statements:
    """What is prepared, for one engine. Threads may prepare the same statement at once; both come to the same."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        # None stands for a statement that was seen once; `False` for one that takes SQLAlchemy's way.
        self._seen: WeakKeyDictionary[Any, dict[tuple[str, ...], Prepared | bool | None]] = WeakKeyDictionary()

    def execute(self, connection: Connection, statement: Any, parameters: Any = None) -> Any:
        """Execute as `connection.execute` does."""
        if parameters is None or type(parameters) is dict:
            given: dict[str, Any] = parameters or {}
            prepared = self._prepared(statement, tuple(given))
            if prepared is not None:
                return prepared.run(connection.connection.dbapi_connection, given)
        return connection.execute(statement, parameters)

    def _prepared(self, statement: Any, names: tuple[str, ...]) -> Prepared | None:
        known = self._seen.get(statement)
        if known is None:
            self._seen[statement] = {names: None}
            return None
        found = known.get(names)
        if found is None:
            if names not in known:
                known[names] = None
                return None
            found = known[names] = self._prepare(statement, names)
        return found if isinstance(found, Prepared) else None

    def _prepare(self, statement: Any, names: tuple[str, ...]) -> Prepared | bool:
        if not isinstance(statement, sa.Select | sa.CompoundSelect | sa.Insert | sa.Update | sa.Delete):
            return False
        compiled: Any = statement.compile(dialect=self._dialect, column_keys=sorted(names))
        return Prepared(compiled, self._dialect, names) if _is_plain(compiled, names) else False


def _is_plain(compiled: Any, names: tuple[str, ...]) -> bool:
    """Tell whether nothing is to be computed at execution but the conversion of each value."""
    if compiled.post_compile_params or compiled.literal_execute_params or compiled.insert_prefetch or compiled.update_prefetch:
        return False
    bound = [compiled.binds[place] for place in compiled.positiontup]
    return all(one.key in names or (one.callable is None and not one.required) for one in bound)


def _parameter(compiled: Any, place: str, names: tuple[str, ...]) -> tuple[str | None, Any, _Convert | None]:
    """Return (name, None, conversion) of a parameter that is given, (None, value, None) of one that is part of the statement."""
    bound, convert = compiled.binds[place], compiled._bind_processors.get(place)
    if bound.key in names:
        return bound.key, None, convert
    value = bound.effective_value
    return None, value if convert is None else convert(value), None


def _result_convert(type_: Any, dialect: Dialect) -> _Convert | None:
    """Return SQLAlchemy's conversion of a column's values, or one that does the same in less time for what most rows hold."""
    convert: _Convert | None = type_._cached_result_processor(dialect, None)
    if isinstance(type_, UtcDateTime):
        return lambda text: None if text is None else datetime.fromisoformat(f"{text}+00:00")
    if type(type_) is sa.JSON:
        read: _Convert = getattr(dialect, "_json_deserializer", None) or json.loads
        return lambda text: None if text is None else read(text)
    return convert


def _row_class(names: tuple[str, ...]) -> Any:
    """Return a tuple whose items are attributes too, by the columns' names."""

    def mapping(row: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(names, row, strict=True))

    fields: dict[str, Any] = {name: property(itemgetter(i)) for i, name in reversed(list(enumerate(names)))}
    return type("LeanRow", (tuple,), {"__slots__": (), **fields, "_names": names, "_mapping": property(mapping)})
