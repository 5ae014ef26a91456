"""Every reason that a refusal gives is true, by an account of its own of host, pools and request; so are its figures."""

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import given

from tests.properties.test_placement import Fleet, fleets, requests
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.placement import (
    FleetSnapshot,
    GroupSnapshot,
    HostSnapshot,
    PlacementKind,
    PlacementRequest,
    PoolSnapshot,
    Relation,
    TaintEffect,
    explain,
)
from trimtab_protos.messages import Firmware

Pools = Mapping[str, PoolSnapshot]
Said = Mapping[str, Any]
IsTrue = Callable[[HostSnapshot, PlacementRequest, Pools, Said], bool]


def vcpus_short(host: HostSnapshot, request: PlacementRequest, _pools: Pools, said: Said) -> bool:
    free = host.vcpus_limit - host.vcpus_claimed - host.unmanaged_vcpus
    return not request.is_dedicated and (said["needed"], said["free"]) == (request.vcpus, free) and free < request.vcpus


def memory_short(host: HostSnapshot, request: PlacementRequest, _pools: Pools, said: Said) -> bool:
    free = host.memory_limit_mib - host.memory_claimed_mib - host.unmanaged_memory_mib
    return not request.page_kib and (said["needed"], said["free"]) == (request.memory_mib, free) and free < request.memory_mib


def space_short(host: HostSnapshot, request: PlacementRequest, pools: Pools, said: Said) -> bool:
    pool = pools[said["pool_id"]]
    place = pool.places.get("" if pool.is_shared else host.host_id)
    free = 0
    if place is not None:
        free = min(place.capacity_bytes - place.claimed_bytes, place.available_bytes)
        free -= place.capacity_bytes * pool.reserve_permille // 1000
    is_copied = request.kind is PlacementKind.MIGRATE and not pool.is_shared
    needed = sum(
        disk.size_bytes
        for disk in request.disks
        if disk.pool_id == pool.pool_id and (not disk.is_claimed or (is_copied and disk.host_id))
    )
    return (said["needed"], said["free"]) == (needed, free) and free < needed


def cells_short(host: HostSnapshot, request: PlacementRequest, _pools: Pools, _said: Said) -> bool:
    pages = request.memory_mib * 1024 // request.page_kib if request.page_kib else 0
    cpus = request.vcpus if request.is_dedicated else 0
    able = [
        cell
        for cell in host.cells
        if cell.cpus_limit - cell.cpus_claimed >= cpus // request.cell_count
        and (
            not pages
            or (
                request.page_kib in cell.pages
                and cell.pages[request.page_kib].limit - cell.pages[request.page_kib].claimed >= pages // request.cell_count
            )
        )
    ]
    return bool(cpus or pages) and len(able) < request.cell_count


def devices_short(host: HostSnapshot, request: PlacementRequest, _pools: Pools, said: Said) -> bool:
    stock = host.devices.get(said["device"])
    return (stock.limit - stock.claimed if stock else 0) == said["free"] < request.devices[said["device"]] == said["needed"]


def resource_short(host: HostSnapshot, request: PlacementRequest, _pools: Pools, said: Said) -> bool:
    stock = host.resources.get(said["resource"])
    return (stock.limit - stock.claimed if stock else 0) == said["free"] < request.resources[said["resource"]] == said["needed"]


def taint_not_tolerated(host: HostSnapshot, request: PlacementRequest, _pools: Pools, said: Said) -> bool:
    is_there = any((one.key, one.value, one.effect) == (said["key"], said["value"], TaintEffect.REFUSE) for one in host.taints)
    return is_there and not any(one.key == said["key"] and one.value in ("", said["value"]) for one in request.tolerations)


def label_mismatch(host: HostSnapshot, request: PlacementRequest, _pools: Pools, said: Said) -> bool:
    return request.host_selector[said["label"]] == said["wanted"] != host.labels.get(said["label"])


def disk_elsewhere(host: HostSnapshot, request: PlacementRequest, pools: Pools, said: Said) -> bool:
    return said["host_id"] != host.host_id and any(
        disk.name == said["disk"] and disk.host_id == said["host_id"] and not pools[disk.pool_id].is_shared
        for disk in request.disks
        if disk.pool_id in pools
    )


# By the code of a reason; groups have their own property.
TRUE_WHEN: dict[str, IsTrue] = {
    "vcpus-short": vcpus_short,
    "memory-short": memory_short,
    "pool-space-short": space_short,
    "pool-space-unknown": space_short,
    "cells-short": cells_short,
    "devices-short": devices_short,
    "resource-short": resource_short,
    "taint-not-tolerated": taint_not_tolerated,
    "label-mismatch": label_mismatch,
    "disk-elsewhere": disk_elsewhere,
    "host-not-up": lambda host, _r, _p, _s: host.connectivity is not HostConnectivity.UP,
    "host-cordoned": lambda host, _r, _p, _s: host.is_cordoned,
    "host-exclusive": lambda host, request, _p, _s: bool(host.exclusive_project_id)
    and host.exclusive_project_id != request.project_id,
    "host-class-mismatch": lambda host, request, _p, _s: bool(request.host_class) and host.host_class != request.host_class,
    "other-host-required": lambda host, request, _p, _s: bool(request.required_host_id)
    and host.host_id != request.required_host_id,
    "host-excluded": lambda host, request, _p, _s: host.host_id in request.excluded_host_ids,
    "arch-mismatch": lambda host, request, _p, _s: bool(request.arch) and host.arch != request.arch,
    "cpu-model-unusable": lambda host, request, _p, _s: bool(request.cpu_model)
    and request.cpu_model not in host.usable_cpu_models,
    "class-cpu-model-unusable": lambda host, request, _p, _s: not request.cpu_model
    and host.class_cpu_model not in ("", *host.usable_cpu_models),
    "cpu-features-missing": lambda host, request, _p, said: bool(said["missing"])
    and set(said["missing"].split(", ")) == {one for one in request.cpu_features if one[0] not in "-?"} - host.cpu_features,
    "machine-missing": lambda host, request, _p, _s: bool(request.machine) and request.machine not in host.machines,
    "class-machine-missing": lambda host, request, _p, _s: not request.machine and host.class_machine not in ("", *host.machines),
    "uefi-missing": lambda host, request, _p, _s: request.firmware is Firmware.UEFI and not host.has_uefi,
    "capability-missing": lambda host, request, _p, said: said["missing"] in request.capabilities
    and said["missing"] not in host.capabilities,
    "accelerator-mismatch": lambda host, request, _p, _s: bool(request.accelerator) and host.accelerator != request.accelerator,
    "qemu-older": lambda host, request, _p, _s: () < host.qemu_series < request.qemu_series,
    "pool-unknown": lambda _h, _r, pools, said: said["pool_id"] not in pools,
    "pool-not-on-host": lambda host, _r, _p, said: said["pool_id"] not in host.pools,
    "pool-not-ready": lambda host, _r, _p, said: host.pools.get(said["pool_id"]) is False,
    "pool-sharing-unproven": lambda _h, _r, pools, said: not pools[said["pool_id"]].is_sharing_proven,
    "network-not-on-host": lambda host, _r, _p, said: said["network_id"] not in host.networks,
    "network-not-ready": lambda host, _r, _p, said: not host.networks[said["network_id"]].is_ready,
    "network-without-carrier": lambda host, _r, _p, said: bool(host.networks[said["network_id"]].lost_bridge),
    "network-mtu-too-small": lambda host, request, _p, said: 0
    < host.networks[said["network_id"]].mtu
    == said["found"]
    < request.networks[0].mtu,
}  # fmt: skip


@given(fleets(), requests(0))
def test_every_reason_against_a_host_is_true(fleet: Fleet, request: PlacementRequest) -> None:
    pools, hosts = {pool.pool_id: pool for pool in fleet[1]}, {host.host_id: host for host in fleet[0]}
    for verdict in explain(FleetSnapshot.of(*fleet), request).refused:
        for reason in verdict.refusals:
            if reason.filter != "group":
                assert TRUE_WHEN[reason.code](hosts[verdict.host_id], request, pools, reason.context), reason


@given(fleets(), requests(0), requests(1))
def test_every_reason_of_a_group_is_true(fleet: Fleet, request: PlacementRequest, other: PlacementRequest) -> None:
    """With the other members on the first hosts, as many as there are racks to fill."""
    if request.group is None:
        return
    hosts = {host.host_id: host for host in fleet[0]}
    at = {f"{other.vm_id}-{host_id}": host_id for host_id in list(hosts)[:2]}
    snapshot = FleetSnapshot.of(*fleet, groups=[GroupSnapshot(group_id=request.group.group_id, members=at)])
    rules = {rule.domain: rule for rule in request.group.rules if rule.is_must}

    def domain(host_id: str, key: str) -> str | None:
        return host_id if key == "host" else hosts[host_id].labels.get(key)

    for verdict in explain(snapshot, request).refused:
        for reason in (one for one in verdict.refusals if one.filter == "group"):
            key = str(reason.context["domain"])
            rule, own = rules[key], domain(verdict.host_id, key)
            there = [domain(host_id, key) for host_id in at.values()]
            match reason.code:
                case "group-domain-missing":
                    assert own is None
                case "group-domain-full":
                    assert rule.relation is Relation.APART
                    assert there.count(own) == reason.context["members"] >= rule.limit == reason.context["limit"]
                case "group-elsewhere":
                    assert rule.relation is Relation.TOGETHER
                    assert there
                    assert own not in there
                case unknown:
                    raise AssertionError(unknown)
