"""Turns the control plane's nouns into what placement decides on: the one place that knows both."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from trimtab_controller.core.model import Host, HostClass, Pool, PoolSpace, Vm, Volume
from trimtab_controller.core.placement.fleet import FleetSnapshot, HostSnapshot, NetworkReach, PoolPlace, PoolSnapshot
from trimtab_controller.core.placement.request import DiskNeed, NetworkNeed, PlacementKind, PlacementRequest

Pairs = Iterable[tuple[str, str]]


def assemble_fleet(
    hosts: Iterable[Host],
    *,
    classes: Mapping[str, HostClass],
    pools: Iterable[Pool],
    spaces: Iterable[PoolSpace],
    ready_pools: Pairs,
    ready_networks: Pairs,
    local_replicas: Pairs,
    network_mtus: Mapping[tuple[str, str], int] | None = None,
) -> FleetSnapshot:
    """Return the snapshot of these rows. Pairs are (pool, network or image id, host id); mtus by such a pair, 0 or none: not known."""
    mtus = network_mtus or {}
    pools_of, networks_of, images_of = _by_host(ready_pools), _by_host(ready_networks), _by_host(local_replicas)
    snapshots = [
        _host(
            host,
            classes[host.host_class_id],
            pools=dict.fromkeys(pools_of[host.id], True),
            networks={each: NetworkReach(True, mtus.get((each, host.id), 0)) for each in networks_of[host.id]},
            image_ids=frozenset(images_of[host.id]),
        )
        for host in hosts
    ]
    places: dict[str, dict[str, PoolPlace]] = defaultdict(dict)
    for space in spaces:
        places[space.pool_id][space.host_id] = PoolPlace(space.capacity_bytes, space.available_bytes, space.claimed_bytes)
    return FleetSnapshot.of(snapshots, [_pool(pool, places[pool.id]) for pool in pools])


def _by_host(pairs: Pairs) -> defaultdict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for identifier, host_id in pairs:
        found[host_id].append(identifier)
    return found


def _host(
    host: Host,
    host_class: HostClass,
    *,
    pools: Mapping[str, bool],
    networks: Mapping[str, NetworkReach],
    image_ids: frozenset[str],
) -> HostSnapshot:
    inventory = host.inventory
    return HostSnapshot(
        host_id=host.id,
        name=host.name,
        vcpus_limit=host.vcpus_limit,
        memory_limit_mib=host.memory_limit_mib,
        vcpus_claimed=host.vcpus_claimed,
        memory_claimed_mib=host.memory_claimed_mib,
        unmanaged_vcpus=host.unmanaged_vcpus,
        unmanaged_memory_mib=host.unmanaged_memory_mib,
        memory_reserve_mib=host_class.memory_reserve_mib,
        labels=host.labels,
        host_class=host_class.name,
        class_cpu_model=host_class.cpu_model or "",
        class_machine=host_class.machine or "",
        is_cordoned=host.is_cordoned,
        connectivity=host.connectivity,
        # Without an inventory nothing is known, and a vm that asks for anything in particular is refused.
        arch=inventory.arch if inventory else "",
        accelerator=inventory.accelerator if inventory else "",
        usable_cpu_models=frozenset(inventory.usable_cpu_models) if inventory else frozenset(),
        cpu_features=frozenset(inventory.cpu_features) if inventory else frozenset(),
        machines=frozenset(inventory.machines) if inventory else frozenset(),
        has_uefi=inventory.has_uefi if inventory else False,
        pools=pools,
        networks=networks,
        image_ids=image_ids,
        generation=host.generation,
    )


def _pool(pool: Pool, places: Mapping[str, PoolPlace]) -> PoolSnapshot:
    return PoolSnapshot(
        pool_id=pool.id,
        name=pool.name,
        is_shared=pool.is_shared,
        is_sharing_proven=pool.sharing_proven_at is not None,
        reserve_permille=pool.reserve_permille,
        places=places,
    )


def assemble_request(
    vm: Vm,
    *,
    request_id: str,
    kind: PlacementKind,
    volumes: Sequence[Volume],
    claimed_volume_ids: frozenset[str],
    networks: Sequence[NetworkNeed],
    required_host_id: str = "",
    source_accelerator: str = "",
    order: int = 0,
) -> PlacementRequest:
    """Return what the vm asks of a host. `claimed_volume_ids` have their space already; the source is of a migration."""
    is_migration = kind is PlacementKind.MIGRATE
    return PlacementRequest(
        request_id=request_id,
        vm_id=vm.id,
        vm_name=vm.name,
        project_id=vm.project_id,
        kind=kind,
        vcpus=vm.vcpus,
        memory_mib=vm.memory_mib,
        disks=tuple(
            DiskNeed(
                name=volume.name,
                pool_id=volume.pool_id,
                size_bytes=volume.size_bytes,
                host_id=volume.host_id,
                is_claimed=volume.id in claimed_volume_ids,
            )
            for volume in volumes
        ),
        networks=tuple(networks),
        arch=vm.arch,
        cpu_model=vm.cpu_model,
        cpu_features=vm.cpu_features,
        machine=vm.machine,
        firmware=vm.firmware,
        accelerator=source_accelerator if is_migration else "",
        host_selector=vm.host_selector,
        host_class=vm.host_class,
        required_host_id=required_host_id,
        excluded_host_ids=(vm.host_id,) if is_migration else (),
        preferred_host_id="" if is_migration else vm.host_id,
        image_ids=tuple(sorted({volume.base_image_id for volume in volumes if volume.base_image_id})),
        priority=vm.priority,
        order=order,
    )
