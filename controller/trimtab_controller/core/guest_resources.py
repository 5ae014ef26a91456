"""What a guest gets of its host: its class of cpu time, and how far its balloon may go. Pure.

A class is a name on the vm (`low`, `normal`, `high`); what it means is the host's class's to say, so that a batch host may give `low`
less than an office host does. Where it says nothing, the table below holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_controller.core.model.compute import Vm
from trimtab_protos.device_messages import GuestResources

WEIGHT_MAX = 1000
LIMIT_MIN_PERCENT, LIMIT_MAX_PERCENT = 5, 100
NO_BALLOON = "memory that can be plugged, huge pages or a device of the host"


@dataclass(frozen=True, slots=True)
class CpuClass:
    weight: int
    """Share of cpu time where the host has too little; 100: as a vm without a class."""
    limit_percent: int = 0
    """Most cpu time of each vcpu, in percent of one cpu; 0: no bound."""


CPU_CLASSES: Mapping[str, CpuClass] = {"low": CpuClass(25), "normal": CpuClass(100), "high": CpuClass(400)}


def resources_of(vm: Vm, cpu_classes: Mapping[str, Mapping[str, Any]]) -> GuestResources | None:
    """Return what the vm's agent is told, `cpu_classes` those of its host's class; None where nothing is to be said."""
    floor_mib = balloon_min_of(vm)
    if not vm.cpu_class and not floor_mib:
        return None
    given = cpu_classes.get(vm.cpu_class)
    found = CpuClass(**given) if given else CPU_CLASSES.get(vm.cpu_class, CpuClass(0))
    return GuestResources(balloon_min_mib=floor_mib, cpu_weight=found.weight, cpu_limit_percent=found.limit_percent)


def balloon_min_of(vm: Vm) -> int:
    """Return the balloon's floor in MiB; 0 for a vm that can have none, as one that a resize left room to grow in."""
    is_possible = may_balloon(
        memory_mib=vm.memory_mib,
        memory_max_mib=vm.memory_max_mib,
        has_pinned_pages=bool(vm.wishes.get("hugepages_kib") or vm.wishes.get("devices")),
    )
    return min(vm.balloon_min_mib, vm.memory_mib) if is_possible else 0


def may_balloon(*, memory_mib: int, memory_max_mib: int, has_pinned_pages: bool) -> bool:
    """Tell whether a guest can give memory back: a balloon and plugged memory count against each other."""
    return memory_max_mib <= memory_mib and not has_pinned_pages
