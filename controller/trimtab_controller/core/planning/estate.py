"""The fleet with the vms on it, as plans, proof and capacity see it: frozen, built once per question.

`FleetSnapshot` knows hosts and pools and counts claims; an `Estate` adds who holds them. A vm's request is what it would ask of a
live migration; the same with another kind is what a restart elsewhere asks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from trimtab_controller.core.lifecycle import ObservedState
from trimtab_controller.core.placement import FleetSnapshot, PlacementKind, PlacementRequest
from trimtab_controller.core.placement.fleet import MEMORY, VCPUS
from trimtab_controller.core.placement.space import NO_SPACE, CellNeed, amounts_of
from trimtab_controller.core.planning.load import HostUse

MIB = 1 << 20


class DrainPolicy(StrEnum):
    """What a drain may do with a vm."""

    MIGRATE = "migrate"
    # Stop it and start it elsewhere where it cannot move while it runs.
    RESTART = "restart"
    # Leave it: its owner moves it.
    WAIT = "wait"


class Power(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"
    # Not heard of, or in between: nothing is planned with it.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSnapshot:
    """One vm that holds a claim on a host, or has disks there."""

    vm_id: str
    name: str
    host_id: str
    request: PlacementRequest
    """Its needs as a live migration without a wished or an excluded host."""
    power: Power = Power.RUNNING
    seen_as: ObservedState = ObservedState.UNKNOWN
    """Of one whose power is not known: how it was seen last, on a host that is up."""
    version: int = 0
    is_protected: bool = True
    """Whether it is restarted elsewhere when its host is lost."""
    drain_policy: DrainPolicy = DrainPolicy.MIGRATE
    devices: tuple[str, ...] = ()
    """Host devices in the guest, by name: they cannot move while it runs."""
    busy_with: str = ""
    """The operation that keeps it from moving now, for example `backup.run op-…`."""
    has_local_layers: bool = False
    """Whether a disk on its host's own storage has snapshots or clones, which do not move along."""
    linked_clones: tuple[str, ...] = ()
    """Names of the vms that are linked clones of such a disk."""
    load_millis: int = 0
    """Predicted CPU use, in thousandths of a core; 0 where nothing was measured."""
    used_mib: int = 0
    """Memory that it is predicted to hold of its host while it runs, whatever it claims; 0 where nothing was measured."""

    @property
    def priority(self) -> int:
        return self.request.priority

    def restart_request(self) -> PlacementRequest:
        """Return what a start elsewhere asks: its disks stay where they are."""
        cold = replace(self.request, kind=PlacementKind.START, accelerator="", qemu_series=())
        return replace(cold, excluded_host_ids=(self.host_id,))

    def migrate_request(self) -> PlacementRequest:
        return replace(self.request, kind=PlacementKind.MIGRATE, excluded_host_ids=(self.host_id,))


@dataclass(frozen=True, slots=True, eq=False)
class Estate:
    """Hosts, pools and the vms that hold compute or local disks. Build it with `of`."""

    fleet: FleetSnapshot
    vms: Mapping[str, VmSnapshot]
    """By id, in order of name."""
    by_host: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Vm ids by host, in order of name; every host of the fleet is a key."""
    host_versions: Mapping[str, int] = field(default_factory=dict)
    cpu_millis: Mapping[str, int] = field(default_factory=dict)
    """What each host's processors can do, in thousandths of a core; its vcpu limit where it is not known."""
    use: Mapping[str, HostUse] = field(default_factory=dict)
    """How each host is predicted to fare, where that is known; as of the reading, whatever is planned since."""

    @classmethod
    def of(
        cls,
        fleet: FleetSnapshot,
        vms: Iterable[VmSnapshot],
        *,
        host_versions: Mapping[str, int] | None = None,
        cpu_millis: Mapping[str, int] | None = None,
        use: Mapping[str, HostUse] | None = None,
    ) -> "Estate":
        """Return the estate of these vms; those on hosts that the fleet does not have are kept and are on no host."""
        ordered = {vm.vm_id: vm for vm in sorted(vms, key=lambda vm: (vm.name, vm.vm_id))}
        grouped: dict[str, list[str]] = {host.host_id: [] for host in fleet.hosts}
        for vm in ordered.values():
            if vm.host_id in grouped:
                grouped[vm.host_id].append(vm.vm_id)
        by_host = {host_id: tuple(vm_ids) for host_id, vm_ids in grouped.items()}
        return cls(fleet, ordered, by_host, dict(host_versions or {}), dict(cpu_millis or {}), dict(use or {}))

    def reusing(self, old: "Estate") -> "Estate":
        """Return this estate with the old one's objects for vms that are equal, by which what is kept along knows them."""
        known = {vm_id: old.vms[vm_id] if old.vms.get(vm_id) == vm else vm for vm_id, vm in self.vms.items()}
        return replace(self, vms=known)

    def changed(self, *, vms: Iterable[VmSnapshot] = (), removed: Iterable[str] = ()) -> "Estate":
        """Return the estate after these vms came, went or changed, their claims booked; everything else stays the same objects.

        The old and the new form of a running vm are taken from and added to what its host has claimed.
        """
        known, fresh = dict(self.vms), {vm.vm_id: vm for vm in vms}
        gone = [known.pop(vm_id) for vm_id in {*removed, *fresh} if vm_id in known]
        known.update(fresh)
        by_host = dict(self.by_host)
        for host_id in {vm.host_id for vm in [*gone, *fresh.values()]} & by_host.keys():
            kept = {vm_id for vm_id in by_host[host_id] if vm_id in known and known[vm_id].host_id == host_id}
            come = {vm.vm_id for vm in fresh.values() if vm.host_id == host_id}
            by_host[host_id] = tuple(sorted(kept | come, key=lambda vm_id: (known[vm_id].name, vm_id)))
        deltas = [(vm, -1) for vm in gone] + [(vm, 1) for vm in fresh.values()]
        fleet = _with_claims(self.fleet, [(vm, sign) for vm, sign in deltas if vm.power is not Power.STOPPED])
        return replace(self, fleet=fleet, vms=known, by_host=by_host)

    def on(self, host_id: str) -> tuple[VmSnapshot, ...]:
        return tuple(self.vms[vm_id] for vm_id in self.by_host.get(host_id, ()))

    def capacity_millis(self, host_id: str) -> int:
        limit = self.fleet.hosts[self.fleet.row_of[host_id]].vcpus_limit * 1000
        return max(1, self.cpu_millis.get(host_id, limit))

    def host_name(self, host_id: str) -> str:
        row = self.fleet.row_of.get(host_id)
        return host_id if row is None else self.fleet.hosts[row].name


def _with_claims(fleet: FleetSnapshot, deltas: Iterable[tuple[VmSnapshot, int]]) -> FleetSnapshot:
    """Return the fleet with compute and places in groups claimed or given back; masks stay, since claims do not matter to them."""
    hosts = list(fleet.hosts)
    free = {resource: column.copy() for resource, column in fleet.free.items()}
    members = dict(fleet.members)
    for vm, sign in deltas:
        row = fleet.row_of.get(vm.host_id)
        if row is None:
            continue
        if vm.request.group is not None:
            own = {**members.get(vm.request.group.group_id, {}), vm.vm_id: row}
            if sign < 0:
                del own[vm.vm_id]
            members[vm.request.group.group_id] = own
        need = CellNeed.of(vm.request)
        amounts = amounts_of(vm.request, NO_SPACE) | (need.amounts(vm.request.held_cells) if need is not None else {})
        for resource, amount in amounts.items():
            if resource in free:
                free[resource][row] -= sign * amount
        hosts[row] = replace(
            hosts[row],
            vcpus_claimed=hosts[row].vcpus_claimed + sign * amounts.get(VCPUS, 0),
            memory_claimed_mib=hosts[row].memory_claimed_mib + sign * amounts.get(MEMORY, 0),
        )
    for column in free.values():
        column.setflags(write=False)
    return replace(fleet, hosts=tuple(hosts), free=free, members=members)


def copied_bytes(vm: VmSnapshot, fleet: FleetSnapshot) -> int:
    """Return what a live migration sends: memory once, and the disks on local pools."""
    local = (
        disk.size_bytes for disk in vm.request.disks if disk.pool_id in fleet.pools and not fleet.pools[disk.pool_id].is_shared
    )
    return vm.request.memory_mib * MIB + sum(local)


def has_local_disk(vm: VmSnapshot, fleet: FleetSnapshot) -> bool:
    return any(disk.pool_id in fleet.pools and not fleet.pools[disk.pool_id].is_shared for disk in vm.request.disks)
