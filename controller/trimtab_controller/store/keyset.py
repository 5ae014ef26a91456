"""Pages of lists by keyset: a page starts after the last row seen, so that it costs the same anywhere in the list and no row is
shown twice or skipped because others came or went. Used by every listing in `store`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.store.schema.base import UtcDateTime
from trimtab_protos.errors import InvalidRequest

Filters = Mapping[str, Callable[[str], sa.ColumnElement[bool]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which part of a list is asked for, and of which rows."""

    limit: int = 100
    # A column of the listed table.
    order_by: str = "name"
    is_descending: bool = False
    # (value of that column, id) of the last row of the page before.
    after: tuple[str, str] | None = None
    # Documented field -> wanted value.
    filters: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one page; `next_after` is None on the last."""

    rows: tuple[sa.Row[Any], ...]
    next_after: tuple[str, str] | None


def fetch(
    session: Session,
    query: sa.Select[Any],
    table: sa.Table,
    page: Page,
    *,
    filters: Filters,
    given: Mapping[str, Any] | None = None,
) -> Rows:
    """Run `query` (which selects at least the ordering column and `id` of `table`) for one page.

    `given`: the parameters of a query that is kept by its module; its pages are built once, where nothing is filtered.
    """
    column = _order_column(table, page)
    asked: dict[str, Any] = {**(given or {}), "at_most": page.limit + 1}
    if page.after is not None:
        value: Any = page.after[0]
        asked |= {"after_value": _instant(value) if isinstance(column.type, UtcDateTime) else value, "after_id": page.after[1]}
    shape = (table, column, page.is_descending, page.after is not None)
    is_kept = given is not None and not page.filters and not page.labels
    statement = _kept(query, *shape) if is_kept else _placed(query.where(*conditions(table, page, filters)), *shape)
    rows = session.execute(statement, asked).all()
    if len(rows) <= page.limit:
        return Rows(tuple(rows), None)
    shown = rows[: page.limit]
    last_row = shown[-1]._mapping
    value = last_row[column.name]
    return Rows(tuple(shown), (value.isoformat() if isinstance(value, datetime) else str(value), str(last_row["id"])))


def _placed(
    query: sa.Select[Any], table: sa.Table, column: sa.Column[Any], is_descending: bool, has_before: bool
) -> sa.Select[Any]:
    """Return the query in order, from the first row or from after the one that it is executed with."""
    identifier = table.c.id
    if has_before:
        last = sa.tuple_(sa.bindparam("after_value", type_=column.type), sa.bindparam("after_id", type_=identifier.type))
        position = sa.tuple_(column, identifier)
        query = query.where(position < last if is_descending else position > last)
    order = (column.desc(), identifier.desc()) if is_descending else (column, identifier)
    return query.order_by(*order).limit(sa.bindparam("at_most", type_=sa.Integer()))


_kept = lru_cache(256)(_placed)


def conditions(table: sa.Table, page: Page, filters: Filters) -> Sequence[sa.ColumnElement[bool]]:
    """Return the WHERE of the page's filters and labels. InvalidRequest for a field the list does not have."""
    found: list[sa.ColumnElement[bool]] = []
    for name, value in page.filters.items():
        if name not in filters:
            raise InvalidRequest(
                "filter-unknown",
                f"filter: there is no field {name!r} here; use one of {', '.join(sorted(filters))}",
                field="filter",
            )
        found.append(filters[name](value))
    if page.labels and "labels" not in table.c:
        raise InvalidRequest("selector-unknown", f"selector: {table.name} has no labels", field="selector")
    found.extend(table.c.labels[key].as_string() == value for key, value in page.labels.items())
    return found


def equals(column: sa.ColumnElement[str]) -> Callable[[str], sa.ColumnElement[bool]]:
    return lambda value: column == value


def is_true(column: sa.ColumnElement[bool], name: str) -> Callable[[str], sa.ColumnElement[bool]]:
    """Return a filter that takes `true` or `false`."""

    def condition(value: str) -> sa.ColumnElement[bool]:
        if value not in {"true", "false"}:
            raise InvalidRequest("filter-value", f"filter: {name} is true or false, not {value!r}", field="filter")
        return column.is_(value == "true")

    return condition


def named(reference: sa.ColumnElement[str], target: sa.Table) -> Callable[[str], sa.ColumnElement[bool]]:
    """Return a filter on a reference by the name or the id of what it refers to."""
    return lambda value: reference.in_(sa.select(target.c.id).where(sa.or_(target.c.name == value, target.c.id == value)))


def _order_column(table: sa.Table, page: Page) -> sa.Column[Any]:
    allowed = [name for name in ("name", "created_at", "id") if name in table.c]
    if page.order_by not in allowed:
        raise InvalidRequest(
            "order-unknown",
            f"order_by: {page.order_by!r} is none of {', '.join(allowed)} (with ` desc` after it or not)",
            field="order_by",
        )
    return table.c[page.order_by]


def _instant(text: str) -> datetime:
    refusal = InvalidRequest("page-token", "page_token: not one that this list gave out; start without it", field="page_token")
    try:
        instant = datetime.fromisoformat(text)
    except ValueError as error:
        raise refusal from error
    if instant.tzinfo is None:
        raise refusal
    return instant
