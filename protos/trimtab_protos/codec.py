"""Maps the dataclasses of `messages.py` to their protobuf messages and back, by field name.

One generic function each way instead of a pair per message: they cannot drift, and a test walks every field of both sides.
Unset enum values and empty sub-messages become `None`; a value that a newer peer sent and this release does not know raises
`InvalidRequest`, since acting on half a spec is worse than refusing it.
"""

import dataclasses
import types
import typing
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
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        if content is None:
            continue
        descriptor = message.DESCRIPTOR.fields_by_name[field.name]
        _write(message, descriptor, content)
    return message


def from_proto(message: Message, target: type[T]) -> T:
    """Return the dataclass `target` that mirrors `message`."""
    fields = {
        name: _read(message, message.DESCRIPTOR.fields_by_name[name], hint)
        for name, hint in _hints(typing.cast(Any, target)).items()
    }
    return target(**fields)


def enum_number(descriptor: EnumDescriptor, member: StrEnum) -> int:
    """Return the protobuf number of `member`."""
    return descriptor.values_by_name[_prefix(descriptor) + member.name].number


def _write(message: Message, descriptor: Any, content: Any) -> None:
    name = descriptor.name
    if _is_map(descriptor):
        getattr(message, name).update(content)
    elif descriptor.message_type is not None and descriptor.is_repeated:
        entries = getattr(message, name)
        for entry in content:
            entries.append(_nested(entry, descriptor))
    elif descriptor.message_type is not None:
        getattr(message, name).CopyFrom(_nested(content, descriptor))
    elif descriptor.is_repeated:
        getattr(message, name).extend(content)
    elif descriptor.enum_type is not None:
        setattr(message, name, enum_number(descriptor.enum_type, content))
    else:
        setattr(message, name, content)


def _nested(content: Any, descriptor: Any) -> Message:
    message_class: type[Message] = descriptor.message_type._concrete_class
    return to_proto(content, message_class)


def _read(message: Message, descriptor: Any, hint: Any) -> Any:
    content = getattr(message, descriptor.name)
    if _is_map(descriptor):
        return dict(content)
    if descriptor.message_type is not None and descriptor.is_repeated:
        (element, *_rest) = typing.get_args(hint)
        return tuple(from_proto(entry, element) for entry in content)
    if descriptor.message_type is not None:
        return from_proto(content, _without_none(hint)) if message.HasField(descriptor.name) else None
    if descriptor.is_repeated:
        return tuple(content)
    if descriptor.enum_type is not None:
        return _read_enum(descriptor, content, hint)
    return content


def _read_enum(descriptor: Any, number: int, hint: Any) -> Any:
    enum_class = _without_none(hint)
    value = descriptor.enum_type.values_by_number.get(number)
    name = value.name.removeprefix(_prefix(descriptor.enum_type)) if value else ""
    if name in enum_class.__members__:
        return enum_class[name]
    if number == 0 and _allows_none(hint):
        return None
    raise InvalidRequest(
        "enum-value-unknown",
        f"{descriptor.full_name} has value {number}, which this release does not know",
        field=descriptor.full_name,
    )


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
