"""Maps the dataclasses of `messages.py` to their protobuf messages and back, by field name.

One generic function each way instead of a pair per message: they cannot drift, and a test walks every field of both sides.
Unset enum values, sub-messages and `optional` fields become `None`; a value that a newer peer sent and this release does not know raises
`InvalidRequest`, since acting on half a spec is worse than refusing it.
"""

import dataclasses
import operator
import types
import typing
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from trimtab_protos.errors import InvalidRequest

M = TypeVar("M", bound=Message)
T = TypeVar("T")


def to_proto(value: Any, message_class: type[M]) -> M:
    """Return the message that mirrors dataclass `value`."""
    message = message_class()
    for name, write in _writers(typing.cast(Any, type(value)), typing.cast(Any, message_class)):
        content = getattr(value, name)
        if content is not None:
            write(message, content)
    return message


def from_proto(message: Message, target: type[T]) -> T:
    """Return the dataclass `target` that mirrors `message`."""
    readers = _readers(typing.cast(Any, type(message)), typing.cast(Any, target))
    return target(**{name: read(message) for name, read in readers})


@cache
def enum_number(descriptor: EnumDescriptor, member: StrEnum) -> int:
    """Return the protobuf number of `member`."""
    return descriptor.values_by_name[_prefix(descriptor) + member.name].number


# How each field is written and read is found once per pair of types: a message is mapped several times for each command.
_Write = Callable[[Message, Any], object]
_Read = Callable[[Message], Any]


@cache
def _writers(source: Any, message_class: Any) -> tuple[tuple[str, _Write], ...]:
    fields = message_class.DESCRIPTOR.fields_by_name
    return tuple((field.name, _writer(fields[field.name])) for field in dataclasses.fields(source))


def _writer(descriptor: Any) -> _Write:
    name = descriptor.name
    if _is_map(descriptor):
        return lambda message, content: getattr(message, name).update(content)
    if descriptor.message_type is not None:
        nested = descriptor.message_type._concrete_class
        if descriptor.is_repeated:
            return lambda message, content: getattr(message, name).extend([to_proto(entry, nested) for entry in content])
        return lambda message, content: getattr(message, name).CopyFrom(to_proto(content, nested))
    if descriptor.is_repeated:
        return lambda message, content: getattr(message, name).extend(content)
    if descriptor.enum_type is not None:
        return lambda message, content: setattr(message, name, enum_number(descriptor.enum_type, content))
    return lambda message, content: setattr(message, name, content)


@cache
def _readers(message_class: Any, target: Any) -> tuple[tuple[str, _Read], ...]:
    fields = message_class.DESCRIPTOR.fields_by_name
    return tuple((name, _reader(fields[name], hint)) for name, hint in _hints(target).items())


def _reader(descriptor: Any, hint: Any) -> _Read:
    name = descriptor.name
    if _is_map(descriptor):
        return lambda message: dict(getattr(message, name))
    if descriptor.message_type is not None and descriptor.is_repeated:
        (element, *_rest) = typing.get_args(hint)
        return lambda message: tuple([from_proto(entry, element) for entry in getattr(message, name)])
    if descriptor.message_type is not None:
        only = _without_none(hint)
        return lambda message: from_proto(getattr(message, name), only) if message.HasField(name) else None
    if descriptor.is_repeated:
        return lambda message: tuple(getattr(message, name))
    if descriptor.enum_type is not None:
        return _enum_reader(descriptor, hint)
    if descriptor.has_presence and _allows_none(hint):
        return lambda message: getattr(message, name) if message.HasField(name) else None
    return operator.attrgetter(name)


def _enum_reader(descriptor: Any, hint: Any) -> _Read:
    enum_class, name = _without_none(hint), descriptor.name
    prefix = _prefix(descriptor.enum_type)
    known = {
        number: enum_class[value.name.removeprefix(prefix)]
        for number, value in descriptor.enum_type.values_by_number.items()
        if value.name.removeprefix(prefix) in enum_class.__members__
    }
    if _allows_none(hint):
        known.setdefault(0, None)

    def read(message: Message) -> Any:
        number = getattr(message, name)
        try:
            return known[number]
        except KeyError:
            raise InvalidRequest(
                "enum-value-unknown",
                f"{descriptor.full_name} has value {number}, which this release does not know",
                field=descriptor.full_name,
            ) from None

    return read


def _prefix(descriptor: EnumDescriptor) -> str:
    return descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")


def _is_map(descriptor: Any) -> bool:
    return descriptor.message_type is not None and bool(descriptor.message_type.GetOptions().map_entry)


@cache
def _hints(target: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(target)
    return {field.name: hints[field.name] for field in dataclasses.fields(target)}


def _allows_none(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)


def _without_none(hint: Any) -> Any:
    if not isinstance(hint, types.UnionType):
        return hint
    (only,) = (argument for argument in typing.get_args(hint) if argument is not type(None))
    return only


def as_json(value: Any) -> dict[str, Any]:
    """Return a flat or nested dataclass of `messages` as plain JSON."""
    return dataclasses.asdict(value)


def from_json(document: dict[str, Any], target: type[T]) -> T:
    """Return a *flat* dataclass of `messages` from what `as_json` made; unknown fields of a newer release are dropped."""
    known = {field.name for field in dataclasses.fields(typing.cast(Any, target))}
    return target(**{name: content for name, content in document.items() if name in known})
