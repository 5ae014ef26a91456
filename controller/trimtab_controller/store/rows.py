"""Turns a row into the frozen dataclass of the same fields; the only place where column types meet model types."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from operator import itemgetter
from typing import Any, TypeVar

import sqlalchemy as sa

T = TypeVar("T")


def columns_of(table: sa.Table, target: type[Any]) -> list[sa.ColumnElement[Any]]:
    """Return the columns of `table` that `target` has fields for, so that a query reads nothing it drops."""
    return [table.c[field.name] for field in dataclasses.fields(target) if field.name in table.c]


def build(target: type[T], row: sa.Row[Any] | Mapping[str, Any], **extra: Any) -> T:
    """Return `target` from a row; `extra` gives fields that are no columns. Lists become tuples, strings enums."""
    names: tuple[str, ...] | None = getattr(type(row), "_names", None)
    if names is not None:
        fields, pick, converts = _plan(typing.cast(Any, target), names, tuple(extra))
        picked = list(pick(row))
        for i, convert in converts:
            picked[i] = convert(picked[i])
        return target(**dict(zip(fields, picked, strict=True)), **extra)
    mapping = row if isinstance(row, Mapping) else row._mapping
    values = extra
    for name, convert in _converters(typing.cast(Any, target)):
        if name not in values:
            values[name] = mapping[name] if convert is None else convert(mapping[name])
    return target(**values)


@cache
def _plan(target: Any, names: tuple[str, ...], given: tuple[str, ...]) -> tuple[tuple[str, ...], Any, list[tuple[int, Any]]]:
    """Return the fields that come from a row with these columns, what picks their values, and which of them are converted."""
    wanted = [(name, convert) for name, convert in _converters(target) if name not in given]
    fields = tuple(name for name, _convert in wanted)
    places = [names.index(name) for name in fields]
    converts = [(i, convert) for i, (_name, convert) in enumerate(wanted) if convert is not None]
    return fields, itemgetter(*places) if len(places) > 1 else lambda row: tuple(row[i] for i in places), converts


@cache
def _converters(target: Any) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(target)
    return [(field.name, _converter(hints[field.name])) for field in dataclasses.fields(target)]


def _converter(hint: Any) -> Any:
    """Return what turns a column's value into the field's, None where it is that already."""
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    inner = next(a for a in typing.get_args(hint) if a is not type(None)) if optional else hint
    if isinstance(inner, type) and issubclass(inner, StrEnum):
        members = {member.value: member for member in inner}
        return lambda value: None if value is None else members.get(value) or inner(value)
    if typing.get_origin(inner) is tuple:
        return lambda value: tuple(value or ())
    return None
