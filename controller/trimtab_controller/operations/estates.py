"""From rows to the `Estate` that plans, proof and capacity are made on."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.model import Host, PlacementAsk
from trimtab_controller.core.placement import FleetSnapshot
from trimtab_controller.core.placement.fleet import MEMORY
from trimtab_controller.core.planning.estate import MIB, DrainPolicy, Estate, Power, VmSnapshot
from trimtab_controller.core.planning.load import HostUse, predicted, wanted_millis
from trimtab_controller.core.planning.timeline import Rates, migration_network
from trimtab_controller.operations import placement_snapshot
from trimtab_controller.store import estate_rows, fleet, hosts_read
from trimtab_controller.store.database import Session
from trimtab_controller.store.estate_rows import EstateVm
from trimtab_controller.store.fleet import FleetRows, GroupRow, VmNeeds
from trimtab_protos.messages import Inventory

CPU_MILLIS = "cpu_millis"
# Of vms: the memory that they really hold of their host. Of hosts: the same, of all their vms together.
MEMORY_MIB = "memory_mib"
GUESTS_MIB = "host_guests_mib"
# Of hosts, by the name that a heartbeat gives them: shares 0..1, and MiB.
HOST_METRICS = {
    "cpu_used_permille": "host_cpu",
    "cpu_steal_permille": "host_steal",
    "cpu_pressure": "host_cpu_pressure",
    "memory_pressure": "host_memory_pressure",
    "memory_available_mib": "host_memory_available_mib",
}
BUCKET_S = 300
# A day: what predicts the next hour lies in the last few of them.
LOOKED_BACK = timedelta(hours=24)
# Memory comes and goes slowly: what is older weighs less than two hundredths.
MEMORY_LOOKED_BACK = timedelta(hours=6)


def read_estate(session: Session, *, now: datetime) -> Estate:
    """Return the fleet, its vms and what they are predicted to use, as of one snapshot."""
    rows = fleet.read_rows(session)
    snapshot = placement_snapshot.snapshot_of(rows, placement_snapshot.baselines_of(rows))
    loads = {vm_id: round(millis) for vm_id, millis in _predicted(session, CPU_MILLIS, now).items()}
    held_mib = {vm_id: round(mib) for vm_id, mib in _predicted(session, MEMORY_MIB, now, MEMORY_LOOKED_BACK).items()}
    hosts = {host.id: host for host in rows.hosts}
    use = _host_use(session, snapshot, hosts, now)
    vms = []
    for found in estate_rows.placed_vms(session):
        vm = _vm(found, _home(found, hosts), loads.get(found.needs.vm.id, 0), rows.groups)
        vms.append(replace(vm, used_mib=held_mib.get(vm.vm_id, 0)))
    return Estate.of(
        snapshot,
        _as_wanted(vms, rows, use),
        host_versions={host.id: host.version for host in rows.hosts},
        cpu_millis={host.id: host.inventory.cpus * 1000 for host in rows.hosts if host.inventory is not None},
        use=use,
    )


def read_vms(session: Session, rows: FleetRows, vm_ids: Collection[str]) -> list[VmSnapshot]:
    """Return these vms, of those that are on hosts, without what they are predicted to use."""
    found = estate_rows.vms_on_hosts(session, vm_ids)
    hosts = {host.id: host for host in rows.hosts}
    return [_vm(one, _home(one, hosts), 0, rows.groups) for one in found]


def as_placed(needs: VmNeeds, host_id: str, rows: FleetRows, *, cells: tuple[int, ...] = ()) -> VmSnapshot:
    """Return a vm as it would be once it runs on this host, its disks on local pools made there."""
    volumes = tuple(
        volume if rows.pools[volume.pool_id].is_shared else replace(volume, host_id=host_id) for volume in needs.volumes
    )
    placed = replace(
        needs,
        vm=replace(needs.vm, host_id=host_id),
        volumes=volumes,
        claimed_volume_ids=frozenset(volume.id for volume in volumes),
        held_cells=cells,
    )
    found = EstateVm(placed, needs.vm.drain_policy, has_compute=True, busy_with="")
    return _vm(found, None, 0, rows.groups)


def read_rates(session: Session) -> Rates:
    """Return the fleet's own migration rates."""
    return Rates.measured([(memory_mib * MIB, seconds) for memory_mib, seconds in estate_rows.migration_samples(session)])


def read_networks(session: Session) -> dict[str, str]:
    """Return the migration network of each host."""
    return {host_id: migration_network(address, labels) for host_id, address, labels in hosts_read.migration_reach(session)}


def _host_use(session: Session, snapshot: FleetSnapshot, hosts: Mapping[str, Host], now: datetime) -> dict[str, HostUse]:
    """Return how each host is predicted to fare in the next hour."""
    cpu, steal, cpu_pressure, memory_pressure, available = (_predicted(session, metric, now) for metric in HOST_METRICS.values())
    guests_mib = _predicted(session, GUESTS_MIB, now, MEMORY_LOOKED_BACK)
    free_mib = dict(zip((host.host_id for host in snapshot.hosts), snapshot.free[MEMORY].tolist(), strict=True))
    return {
        host_id: HostUse(
            cpu=share,
            steal=steal.get(host_id, 0.0),
            cpu_pressure=cpu_pressure.get(host_id, 0.0),
            memory_pressure=memory_pressure.get(host_id, 0.0),
            memory_withheld_mib=max(0, free_mib.get(host_id, 0) - round(available[host_id])) if available.get(host_id) else 0,
            **_memory(hosts.get(host_id), available.get(host_id, 0.0), guests_mib.get(host_id)),
        )
        for host_id, share in cpu.items()
    }


def _memory(host: Host | None, available_mib: float, guests_mib: float | None) -> dict[str, int]:
    """Return what the host has, and what others than its guests use of it; nothing where one of the figures is missing."""
    if host is None or host.inventory is None or not available_mib or guests_mib is None:
        return {}
    used_mib = host.inventory.memory_mib - available_mib
    return {"memory_mib": host.inventory.memory_mib, "memory_others_mib": max(0, round(used_mib - guests_mib))}


def _as_wanted(vms: Sequence[VmSnapshot], rows: FleetRows, use_of: Mapping[str, HostUse]) -> list[VmSnapshot]:
    """Return the vms with what they would use if their hosts were not short: who waits for a processor uses less than it wants."""
    cores = {host.id: host.inventory.cpus * 1000 for host in rows.hosts if host.inventory is not None}
    on_host: dict[str, list[VmSnapshot]] = defaultdict(list)
    for vm in vms:
        on_host[vm.host_id].append(vm)
    wanted = []
    for host_id, own in on_host.items():
        use, used = use_of.get(host_id), [vm.load_millis for vm in own]
        if use is not None and host_id in cores:
            used = wanted_millis(used, use, capacity_millis=cores[host_id])
        wanted += [replace(vm, load_millis=millis) for vm, millis in zip(own, used, strict=True)]
    return wanted


def _predicted(session: Session, metric: str, now: datetime, looked_back: timedelta = LOOKED_BACK) -> dict[str, float]:
    """Return what each subject's metric is predicted to be in the next hour."""
    begin = now - looked_back
    history = estate_rows.usage_since(session, metric, begin, bucket_s=BUCKET_S)
    width = int(looked_back.total_seconds()) // BUCKET_S + 1
    samples = np.full((len(history), width), np.nan)
    for row, measured in enumerate(history.values()):
        for at, mean in measured:
            column = int((at - begin).total_seconds()) // BUCKET_S
            if 0 <= column < width:
                samples[row, column] = mean
    means = predicted(samples, step_s=BUCKET_S) if history else np.zeros(0)
    return {subject_id: float(mean) for subject_id, mean in zip(history, means, strict=True)}


def _home(found: EstateVm, hosts: Mapping[str, Host]) -> Inventory | None:
    home = hosts.get(found.needs.vm.host_id)
    return home.inventory if home is not None else None


def _vm(found: EstateVm, home: Inventory | None, load_millis: int, groups: Mapping[str, GroupRow]) -> VmSnapshot:
    vm = found.needs.vm
    ask = PlacementAsk(
        operation_id=f"plan-{vm.id}",
        vm_id=vm.id,
        project_id=vm.project_id,
        kind="migrate",
        to_host_id="",
        previous_host_id="",
        state="pending",
        chosen_host_id="",
        epoch=vm.epoch,
        decision_id="",
        refusal="",
        created_at=vm.created_at,
    )
    return VmSnapshot(
        vm_id=vm.id,
        name=vm.name,
        host_id=vm.host_id,
        request=placement_snapshot.request_of(ask, found.needs, source=home, groups=groups),
        power=_power(found),
        seen_as=vm.observed_state,
        version=vm.version,
        is_protected=vm.ha == "restart",
        drain_policy=DrainPolicy(found.drain_policy),
        devices=tuple(sorted(vm.wishes.get("devices", {}))) if found.has_compute else (),
        busy_with=found.busy_with,
        has_local_layers=found.has_local_layers,
        linked_clones=found.linked_clones,
        load_millis=load_millis,
    )


def _power(found: EstateVm) -> Power:
    if not found.has_compute:
        return Power.STOPPED
    return Power.RUNNING if found.needs.vm.observed_state is ObservedState.RUNNING else Power.UNKNOWN
