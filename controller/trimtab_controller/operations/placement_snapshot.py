"""From rows to what `core.placement` decides on: the only place that knows both."""

from collections import defaultdict
from collections.abc import Callable, Mapping

from trimtab_controller.core import cpu_features, qemu_series
from trimtab_controller.core.baseline import Baseline, common_baseline
from trimtab_controller.core.model import Host, HostClass, PlacementAsk
from trimtab_controller.core.placement.columns import Scarce, scarce_of
from trimtab_controller.core.placement.fleet import FleetSnapshot, HostSnapshot, NetworkReach, PoolPlace, PoolSnapshot
from trimtab_controller.core.placement.lifetimes import family_of
from trimtab_controller.core.placement.needs import DiskNeed, GroupNeed, GroupRule, NetworkNeed, Toleration
from trimtab_controller.core.placement.policies import BEST_FIT, POLICIES, Policy
from trimtab_controller.core.placement.request import PlacementKind, PlacementRequest
from trimtab_controller.core.placement.snapshot import GroupSnapshot, Stock, Taint, TaintEffect
from trimtab_controller.store import wires
from trimtab_controller.store.fleet import FleetRows, GroupRow, VmNeeds
from trimtab_protos.messages import Inventory


def baselines_of(rows: FleetRows) -> dict[str, Baseline]:
    """Return each class's machine type and CPU model: as fixed, else what all of its members share now; '' where neither."""
    members = defaultdict(list)
    for host in rows.hosts:
        if host.inventory is not None:
            members[host.host_class_id].append(host.inventory)
    found = {}
    for class_id, known in rows.classes.items():
        is_fixed = known.machine and known.cpu_model
        derived = None if is_fixed else common_baseline(members[class_id])
        found[class_id] = Baseline(
            known.machine or (derived.machine if derived else ""), known.cpu_model or (derived.cpu_model if derived else "")
        )
    return found


def lacks_baseline(rows: FleetRows, baselines: Mapping[str, Baseline], class_id: str) -> str:
    """Return why no vm can be given a machine type and CPU model in this class, '' where one can."""
    baseline, name = baselines[class_id], rows.classes[class_id].name
    if baseline.machine and baseline.cpu_model:
        return ""
    return (
        f"the hosts of class {name} share no machine type and CPU model; "
        f"set them with `trimtab host-class update {name}`, or put unlike hosts into classes of their own"
    )


def snapshot_of(rows: FleetRows, baselines: Mapping[str, Baseline]) -> FleetSnapshot:
    """Return the fleet as of these rows."""
    pools_on, networks_on, images_on = _by_host(rows)
    hosts = [
        _host(
            host,
            rows.classes[host.host_class_id],
            baselines,
            pools_on[host.id],
            networks_on[host.id],
            images_on[host.id],
            scarce_of({name: Stock(*amounts) for name, amounts in rows.stocks.get(host.id, {}).items()}),
            can_be_proven_off=host.id not in rows.unprotected,
        )
        for host in rows.hosts
    ]
    groups = [
        GroupSnapshot(group_id=group.id, members=group.members, generation=group.generation) for group in rows.groups.values()
    ]
    return FleetSnapshot.of(hosts, [_pool(rows, pool_id) for pool_id in rows.pools], groups=groups)


def request_of(
    ask: PlacementAsk, needs: VmNeeds, *, source: Inventory | None, groups: Mapping[str, GroupRow] | None = None
) -> PlacementRequest:
    """Return what the vm asks. `source`: of the host that it is on, for a live migration; `groups`: those of the fleet's rows."""
    vm = needs.vm
    wishes = vm.wishes
    group = (groups or {}).get(needs.group_id)
    is_migration = ask.kind == PlacementKind.MIGRATE
    left = source if is_migration else None
    return PlacementRequest(
        request_id=ask.operation_id,
        vm_id=vm.id,
        vm_name=vm.name,
        project_id=vm.project_id,
        kind=PlacementKind(ask.kind),
        vcpus=vm.vcpus,
        memory_mib=vm.memory_mib,
        disks=tuple(
            DiskNeed(
                name=volume.name,
                pool_id=volume.pool_id,
                size_bytes=volume.size_bytes,
                host_id=volume.host_id,
                # A LUN takes room from nobody else.
                is_claimed=volume.id in needs.claimed_volume_ids or bool(volume.unit),
            )
            for volume in needs.volumes
        ),
        networks=tuple(NetworkNeed(network_id=one.network_id, name=one.name, mtu=one.mtu) for one in needs.networks),
        arch=vm.arch,
        cpu_model=vm.cpu_model,
        cpu_features=cpu_features.of_running(vm.cpu_features, left.cpu_features) if left else vm.cpu_features,
        machine=vm.machine,
        firmware=vm.firmware,
        capabilities=_capabilities(needs),
        accelerator=left.accelerator if left else "",
        qemu_series=qemu_series.running(left, vm.id),
        host_selector=vm.host_selector,
        host_class=vm.host_class,
        required_host_id=ask.to_host_id,
        excluded_host_ids=(vm.host_id,) if is_migration and vm.host_id else (),
        preferred_host_id=vm.host_id if ask.kind == PlacementKind.START else "",
        image_ids=needs.image_ids,
        is_dedicated=bool(wishes.get("dedicated", False)),
        page_kib=int(wishes.get("hugepages_kib", 0)),
        cell_count=int(wishes.get("numa_cells", 1)),
        held_cells=needs.held_cells,
        devices=wishes.get("devices", {}),
        resources=wishes.get("resources", {}),
        tolerations=tuple(Toleration(one["key"], one.get("value", "")) for one in wishes.get("tolerations", ())),
        group=_group_need(group) if group is not None else None,
        restarts_elsewhere=vm.ha == "restart",
        family=family_of(vm.project_id, vm.name),
        priority=vm.priority,
        order=int(ask.created_at.timestamp() * 1_000_000),
    )


def _capabilities(needs: VmNeeds) -> tuple[str, ...]:
    """Return what the host's agent must be able to do for the vm.

    One that knows no layers would let the guest write to the bottom one: what a snapshot keeps would be lost.
    """
    vm, wishes = needs.vm, needs.vm.wishes
    has_layers = any(volume.layer_id or volume.parent_volume_id for volume in needs.volumes)
    has_cells = bool(wishes.get("dedicated") or wishes.get("hugepages_kib"))
    wanted = (
        ("tpm", vm.has_tpm),
        (cpu_features.OPTIONAL, cpu_features.has_optional(vm.cpu_features)),
        ("layers", has_layers),
        ("numa-tuning", has_cells),
        ("host-devices", bool(wishes.get("devices"))),
        (wires.CAPABILITY, bool(wishes.get(wires.WISH))),
        ("volume-luks", any(volume.is_encrypted for volume in needs.volumes)),
    )
    return tuple(name for name, is_wanted in wanted if is_wanted)


def _group_need(group: GroupRow) -> GroupNeed:
    return GroupNeed(group_id=group.id, name=group.name, rules=tuple(GroupRule.from_json(rule) for rule in group.rules))


def policy_of(rows: FleetRows) -> Callable[[PlacementRequest], Policy]:
    """Return the policy of the class that a request names, else the default class's; an unknown one falls back to best fit."""
    by_class = {known.name: POLICIES.get(known.policy, BEST_FIT) for known in rows.classes.values()}
    return lambda request: by_class.get(request.host_class or "default", BEST_FIT)


def _host(
    host: Host,
    host_class: HostClass,
    baselines: Mapping[str, Baseline],
    pools: Mapping[str, bool],
    networks: Mapping[str, NetworkReach],
    images: frozenset[str],
    scarce: Scarce,
    *,
    can_be_proven_off: bool,
) -> HostSnapshot:
    inventory = host.inventory
    cells, devices, resources = scarce
    baseline = baselines[host_class.id]
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
        class_cpu_model=baseline.cpu_model,
        class_machine=baseline.machine,
        is_cordoned=host.is_cordoned,
        connectivity=host.connectivity,
        arch=inventory.arch if inventory else "",
        accelerator=inventory.accelerator if inventory else "",
        usable_cpu_models=frozenset(inventory.usable_cpu_models if inventory else ()),
        cpu_features=frozenset(inventory.cpu_features if inventory else ()),
        machines=frozenset(inventory.machines if inventory else ()),
        qemu_series=qemu_series.installed(inventory),
        has_uefi=inventory.has_uefi if inventory else False,
        capabilities=frozenset(inventory.capabilities if inventory else ()),
        pools=pools,
        networks=networks,
        image_ids=images,
        generation=host.generation,
        taints=frozenset(Taint(one["key"], one["value"], TaintEffect(one["effect"])) for one in host.taints),
        exclusive_project_id=host.exclusive_project_id,
        cells=cells,
        devices=devices,
        resources=resources,
        can_be_proven_off=can_be_proven_off,
    )


def _pool(rows: FleetRows, pool_id: str) -> PoolSnapshot:
    pool = rows.pools[pool_id]
    return PoolSnapshot(
        pool_id=pool.id,
        name=pool.name,
        is_shared=pool.is_shared,
        is_sharing_proven=not pool.is_shared or pool.sharing_proven_at is not None,
        reserve_permille=pool.reserve_permille,
        places={
            space.host_id: PoolPlace(space.capacity_bytes, space.available_bytes, space.claimed_bytes, space.written_bytes)
            for space in rows.spaces
            if space.pool_id == pool_id
        },
    )


def _by_host(
    rows: FleetRows,
) -> tuple[defaultdict[str, dict[str, bool]], defaultdict[str, dict[str, NetworkReach]], defaultdict[str, frozenset[str]]]:
    pools: defaultdict[str, dict[str, bool]] = defaultdict(dict)
    networks: defaultdict[str, dict[str, NetworkReach]] = defaultdict(dict)
    images: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
    for pool_id, host_id, is_ready in rows.pool_reach:
        pools[host_id][pool_id] = is_ready
    for network_id, host_id, is_ready, mtu in rows.network_reach:
        networks[host_id][network_id] = NetworkReach(is_ready, mtu, rows.unlinked.get((network_id, host_id), ""))
    for image_id, host_id in rows.local_replicas:
        images[host_id] |= {image_id}
    return pools, networks, images
