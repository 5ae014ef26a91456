"""Inventories as JSON columns: written when a host reports a new digest, read once per digest."""

import dataclasses
import typing
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from threading import Lock
from typing import Any

from trimtab_protos.messages import Inventory

_CACHED_MAX = 20_000
LOST_AT = "carrier_lost_at"
"""In a stored bridge without carrier: since when hosts have said so. Not in the message, whose digest must not know it."""
_cached: "OrderedDict[tuple[str, str], Inventory]" = OrderedDict()
_lock = Lock()


def to_json(inventory: Inventory) -> dict[str, Any]:
    """Return the inventory without the pools' space, which has tables of its own."""
    document = dataclasses.asdict(inventory)
    document["pools"] = []
    return document


def note_lost_carriers(document: dict[str, Any], before: Mapping[str, Any] | None, *, now: datetime) -> None:
    """Write into a document that is about to be stored since when its bridges lack their carriers, as the one before it had it."""
    known = {one["name"]: one.get(LOST_AT) for one in (before or {}).get("bridges", ()) if not one.get("has_carrier", True)}
    for bridge in document["bridges"]:
        if not bridge["has_carrier"]:
            bridge[LOST_AT] = known.get(bridge["name"]) or now.isoformat()


def from_json(document: Mapping[str, Any]) -> Inventory:
    """Return the inventory; fields that this release does not know are dropped, missing ones get their defaults."""
    return typing.cast(Inventory, _build(Inventory, document))


def cached(host_id: str, digest: str) -> Inventory | None:
    """Return the inventory if this process has read it before. The key names the host: a digest is only a host's own word."""
    with _lock:
        found = _cached.get((host_id, digest))
        if found is not None:
            _cached.move_to_end((host_id, digest))
        return found


def remember(host_id: str, digest: str, inventory: Inventory) -> None:
    with _lock:
        _cached[(host_id, digest)] = inventory
        while len(_cached) > _CACHED_MAX:
            _cached.popitem(last=False)


def _build(target: Any, document: Mapping[str, Any]) -> Any:
    return target(**{name: read(document[name]) for name, read in _readers(target).items() if name in document})


@cache
def _readers(target: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(target)
    return {field.name: _reader(hints[field.name]) for field in dataclasses.fields(target)}


def _reader(hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        element = _reader(typing.get_args(hint)[0])
        return lambda values: tuple(element(value) for value in values)
    if origin is dict:  # JSON has only string keys
        key, _value = typing.get_args(hint)
        return lambda values: {key(name): value for name, value in values.items()}
    if dataclasses.is_dataclass(hint):
        return lambda value: _build(hint, value)
    return lambda value: value
