"""Vms that ask the same of a host but differ in size, and the hosts that each such class may use at all.

A fleet of twenty thousand vms has a few dozen classes. What a class may use is asked of the scheduler's own filters, once, for a vm
of no size; what is left for every single vm is a comparison of numbers. Needs that the numbers below do not cover (a group's rule,
a device, a NUMA cell) make a vm special: it goes through the scheduler itself.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

import numpy as np

from trimtab_controller.core.placement import Books, FleetSnapshot, PlacementRequest
from trimtab_controller.core.placement.books import SpaceNeed, Trial
from trimtab_controller.core.placement.fleet import Mask
from trimtab_controller.core.placement.sieve import Sieve

# Say nothing about where a vm may go besides its size.
_FREE = frozenset(
    {
        "request_id",
        "vm_id",
        "vm_name",
        "vcpus",
        "memory_mib",
        "disks",
        "priority",
        "order",
        "family",
        "image_ids",
        "restarts_elsewhere",
    }
)
# Asked of the filters once per class; the pools of disks are added by `_key`.
_ASKED = frozenset(
    {
        "project_id",
        "kind",
        "networks",
        "arch",
        "cpu_model",
        "cpu_features",
        "machine",
        "firmware",
        "accelerator",
        "qemu_series",
        "host_selector",
        "host_class",
        "required_host_id",
        "excluded_host_ids",
        "preferred_host_id",
        "tolerations",
    }
)


def is_special(request: PlacementRequest, fleet: FleetSnapshot) -> bool:
    """Tell whether numbers of vcpus and memory do not decide about this vm within its class."""
    space = SpaceNeed.of(request, fleet)
    return bool(space.local_bytes or space.shared_bytes or space.bound) or asks_more_than_numbers(request)


def asks_more_than_numbers(request: PlacementRequest) -> bool:
    """Tell whether a rule binds this vm that neither its class nor vcpus, memory and space of pools express."""
    return any(getattr(request, name) != default for name, default in _OTHERS)


class Classes:
    """The classes met so far and their masks. Claims do not matter to it; `rebase` follows the properties of hosts.

    Nor do the rules of a vm's group: what they allow changes with each member that moves.

    Needs that differ and get the same answer, such as those of two projects, are one class: fewer classes, larger groups.
    """

    __slots__ = ("_asked", "_books", "_number_of", "_number_of_mask", "masks")

    def __init__(self, fleet: FleetSnapshot) -> None:
        self._books = _roomy(fleet)
        self._number_of: dict[Hashable, int] = {}
        self._number_of_mask: dict[bytes, int] = {}
        self._asked: list[tuple[int, PlacementRequest]] = []
        self.masks: list[Mask] = []

    def of(self, request: PlacementRequest) -> int:
        """Return the number of the request's class; its mask is `masks[number]`."""
        key = _key(request)
        number = self._number_of.get(key)
        if number is None:
            disks = tuple(replace(disk, size_bytes=0, host_id="") for disk in request.disks)
            sizeless = replace(request, vcpus=0, memory_mib=0, disks=disks, group=None)
            mask = self._ask(sizeless)
            number = self._number_of[key] = self._number_of_mask.setdefault(mask.tobytes(), len(self.masks))
            if number == len(self.masks):
                self.masks.append(mask)
            self._asked.append((number, sizeless))
        return number

    def rebase(self, fleet: FleetSnapshot) -> list[int] | None:
        """Ask again on a fleet of the same hosts in the same rows; return the rows for which some class's answer changed.

        None where needs that were one class are not any more, or became one: then start anew.
        """
        self._books = _roomy(fleet)
        masks: dict[int, Mask] = {}
        for number, asked in self._asked:
            mask = self._ask(asked)
            if number in masks and not np.array_equal(masks[number], mask):
                return None
            masks[number] = mask
        by_mask = {mask.tobytes(): number for number, mask in masks.items()}
        if len(by_mask) < len(masks):
            return None
        changed: set[int] = set()
        for number, mask in masks.items():
            changed.update(np.flatnonzero(mask != self.masks[number]).tolist())
            self.masks[number] = mask
        self._number_of_mask = by_mask
        return sorted(changed)

    def _ask(self, sizeless: PlacementRequest) -> Mask:
        return Sieve.of(Trial.of(self._books, sizeless)).fits


def _roomy(fleet: FleetSnapshot) -> Books:
    """Return books in which nothing is overcommitted: such a host is refused by its numbers, not for its class."""
    books = Books(fleet)
    for column in books.free.values():
        np.maximum(column, 0, out=column)
    books.shared_free_bytes = {pool_id: max(0, free) for pool_id, free in books.shared_free_bytes.items()}
    return books


def _key(request: PlacementRequest) -> Hashable:
    pools = tuple(sorted({disk.pool_id for disk in request.disks}))
    asked = tuple(_frozen(getattr(request, name)) for name in _ASKED_HERE)
    more = tuple(
        (name, _frozen(own)) for name, default in _OTHERS if (own := getattr(request, name)) != default and name != "group"
    )
    return (pools, asked, more)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return frozenset(value.items())
    return tuple(value) if isinstance(value, list) else value


def _defaults(names: Iterable[str]) -> list[tuple[str, Any]]:
    found = []
    for each in fields(PlacementRequest):
        if each.name in names:
            default = each.default_factory() if each.default_factory is not MISSING else each.default
            found.append((each.name, default))
    return found


_ALL = frozenset(each.name for each in fields(PlacementRequest))
_ASKED_HERE = sorted(_ASKED & _ALL)
# Whatever else a request may ask, now or in a later release: not its default, so special.
_OTHERS = _defaults(_ALL - _FREE - _ASKED)
