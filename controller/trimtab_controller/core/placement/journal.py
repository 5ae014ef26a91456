"""The digest of everything that a decision was made on: equal digests under one policy mean equal decisions.

It runs along a batch, since each decision sees the claims of those before it. One thing is not in it: how long vms are expected to
live, which the lifetime-aware policy alone asks, and which time alone changes.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any

from trimtab_controller.core.placement.fleet import FleetSnapshot
from trimtab_controller.core.placement.snapshot import HostSnapshot, PoolSnapshot

# What has no order of its own. All other fields are taken as they are, so that one which a filter comes to read is never forgotten.
_SETS = ("usable_cpu_models", "cpu_features", "machines", "capabilities", "image_ids", "taints")
_MAPPINGS = ("labels", "pools", "networks", "devices", "resources")
_APART = {*_SETS, *_MAPPINGS, "cells"}
_sets_of: Callable[[HostSnapshot], tuple[frozenset[Any], ...]] = attrgetter(*_SETS)
_mappings_of: Callable[[HostSnapshot], tuple[Mapping[str, Any], ...]] = attrgetter(*_MAPPINGS)
_rest_of: Callable[[HostSnapshot], tuple[Any, ...]] = attrgetter(
    *(field.name for field in fields(HostSnapshot) if field.name not in _APART)
)


class InputDigest:
    """Of one batch: the fleet, then each request with what was chosen for it, in order."""

    def __init__(self, fleet: FleetSnapshot) -> None:
        seen, text = hashlib.sha256(), _Text()
        for host in fleet.hosts:
            seen.update(text.of(host).encode())
        for resource, column in sorted(fleet.free.items()):
            seen.update(resource.encode() + column.tobytes())
        pools = [_of_pool(pool) for pool in fleet.pools.values()]
        seen.update(json.dumps([pools, sorted(fleet.shared_free_bytes.items()), _plain(fleet.members)]).encode())
        self._state = seen.digest()

    def next(self, stored: Mapping[str, Any]) -> str:
        """Return the digest of the inputs of a decision, given in its stored form."""
        asked = json.dumps(stored["request"], sort_keys=True).encode()
        inputs = hashlib.sha256(self._state + asked)
        self._state = hashlib.sha256(inputs.digest() + str(stored["chosen_host_id"]).encode()).digest()
        return inputs.hexdigest()


class _Text:
    """Equal text for equal hosts. They are alike in most of what they can do, so each distinct set and mapping is written once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, str] = {}

    def of(self, host: HostSnapshot) -> str:
        parts = [self._written(one, one) for one in _sets_of(host)]
        parts += [self._written(tuple(one.items()), one.items()) for one in _mappings_of(host)]
        cells = [(one.cell, one.cpus_limit, one.cpus_claimed, sorted(one.pages.items(), key=_key)) for one in host.cells]
        return repr((_rest_of(host), parts, cells))

    def _written(self, key: Hashable, items: Iterable[Any]) -> str:
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = repr(sorted(map(repr, items)))
        return known


def _key(item: tuple[Any, Any]) -> Any:
    return item[0]


def _of_pool(pool: PoolSnapshot) -> list[Any]:
    """Return what is decided on of a pool besides its free space, which is in the columns."""
    return [pool.pool_id, pool.name, pool.is_shared, pool.is_sharing_proven]


def _plain(members: Mapping[str, Mapping[str, int]]) -> list[Any]:
    return sorted((group_id, sorted(rows.items())) for group_id, rows in members.items())
