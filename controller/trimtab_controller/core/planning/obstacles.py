"""What keeps a vm on its host, with the cure: told before anything is moved, so that no drain hangs in silence."""

from trimtab_controller.core.background import BACKUP
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState
from trimtab_controller.core.placement import Decision
from trimtab_controller.core.planning.estate import DrainPolicy, Estate, Power, VmSnapshot, has_local_disk
from trimtab_controller.core.planning.plan import Blocker, Cause, StepKind


def way_out(vm: VmSnapshot, estate: Estate) -> StepKind | Blocker | None:
    """Return how a drain moves this vm, what is in the way, or None where it has nothing to move."""
    if vm.power is Power.STOPPED:
        return None  # holds no compute; its disks stay where they are, and a start places it again
    row = estate.fleet.row_of.get(vm.host_id)
    connectivity = HostConnectivity.LOST if row is None else estate.fleet.hosts[row].connectivity
    if connectivity is not HostConnectivity.UP:
        name = estate.host_name(vm.host_id)
        message = f"its host {name} is {connectivity.value}: vms leave only a host that is up"
        return _blocker(vm, Cause.STATE_UNKNOWN, message, f"once it is fenced: `trimtab plan create evacuate {name}`")
    if vm.power is Power.UNKNOWN:
        return _not_running(vm)
    if vm.busy_with:
        kind, _, operation_id = vm.busy_with.rpartition(" ")
        return _blocker(
            vm,
            Cause.BACKUP if kind == BACKUP else Cause.BUSY,
            f"{vm.busy_with} is under way",
            f"wait with `trimtab op wait {operation_id}`, or end it with `trimtab op cancel {operation_id}`; then make the plan again",
        )
    match vm.drain_policy:
        case DrainPolicy.WAIT:
            message = "its drain policy is wait: it is left to its owner"
            cure = f"stop it with `trimtab vm stop {vm.name}`, or `trimtab vm update {vm.name} --drain-policy migrate`"
            return _blocker(vm, Cause.DRAIN_POLICY, message, cure)
        case DrainPolicy.RESTART if vm.devices:
            return _restart(vm, estate)
        case DrainPolicy.RESTART | DrainPolicy.MIGRATE:
            return _migrate(vm)


def _migrate(vm: VmSnapshot) -> StepKind | Blocker:
    if vm.linked_clones:
        message = f"{', '.join(vm.linked_clones)}: linked clones of its disk on its host's own storage, which would stay behind"
        cure = f"`trimtab vm migrate {vm.linked_clones[0]}` makes one independent while it runs; then make the plan again"
        return _blocker(vm, Cause.LOCAL_DISK, message, cure)
    if vm.has_local_layers:
        message = "it has snapshots on its host's own storage, which would stay behind"
        cure = f"merge them while it runs: `trimtab vm snapshot list {vm.name}`, `trimtab vm snapshot delete {vm.name} NAME`"
        return _blocker(vm, Cause.LOCAL_DISK, message, cure)
    if not vm.devices:
        return StepKind.MIGRATE
    message = f"it has host device {', '.join(vm.devices)}, which cannot move while it runs"
    cure = f"allow a stop and a start elsewhere: `trimtab vm update {vm.name} --drain-policy restart`"
    return _blocker(vm, Cause.DEVICE, message, cure)


def _restart(vm: VmSnapshot, estate: Estate) -> StepKind | Blocker:
    if not has_local_disk(vm, estate.fleet):
        return StepKind.RESTART
    message = "it has a host device and a disk on a local pool: it can neither move live nor start elsewhere"
    cure = f"move its disks to a shared pool, or stop it with `trimtab vm stop {vm.name}` for the time of the maintenance"
    return _blocker(vm, Cause.LOCAL_DISK, message, cure)


def no_target(vm: VmSnapshot, kind: StepKind, decision: Decision) -> Blocker:
    """Return the blocker of a vm that no host takes; the cure follows from the rule that refused most hosts."""
    refused = decision.refused_by
    if any("group" in name or "affinity" in name for name in refused):
        cure = (
            "add a host in another failure domain, or make the group's rule soft: `trimtab vm-group update GROUP --prefer-apart`"
        )
        return _blocker(vm, Cause.ANTI_AFFINITY, decision.summary(), cure)
    if kind is not StepKind.MIGRATE and "disks" in refused:
        cure = "restore it from a backup, or bring its host back"
        return _blocker(vm, Cause.LOCAL_DISK, decision.summary(), cure)
    short = sorted({"vcpus", "memory", "space"} & refused.keys())
    room = f"free {' and '.join(short)}: stop or move vms, uncordon or add a host" if short else "change what refuses it"
    return _blocker(vm, Cause.NO_TARGET, decision.summary(), f"{room}; `trimtab vm explain {vm.name}` names every host's reason")


def recovery_blocker(vm: VmSnapshot, estate: Estate) -> Blocker | None:
    """Return what stands against restarting a vm of a lost host elsewhere; None: nothing but room."""
    row = estate.fleet.row_of.get(vm.host_id)
    if row is not None and estate.fleet.hosts[row].connectivity is not HostConnectivity.FENCED:
        host = estate.fleet.hosts[row]
        message = f"host {host.name} is {host.connectivity.value}, not fenced: it may still run the vm"
        return _blocker(vm, Cause.NOT_FENCED, message, f"fence it first: `trimtab host fence {host.name}`")
    if not vm.is_protected:
        message = "high availability is off for it"
        return _blocker(vm, Cause.NOT_PROTECTED, message, f"`trimtab vm update {vm.name} --ha restart`")
    return None


def _not_running(vm: VmSnapshot) -> Blocker:
    """Return why one that is wanted running and was not seen so is not moved, by how it was seen."""
    match vm.seen_as:
        case ObservedState.STOPPED | ObservedState.CRASHED | ObservedState.ABSENT:
            cure = (
                f"`trimtab vm start {vm.name}` starts it again, `trimtab vm stop {vm.name}` leaves it off, which holds up no plan"
            )
            return _blocker(vm, Cause.NOT_RUNNING, "it ended and is still wanted running", cure)
        case ObservedState.PAUSED:
            message = f"it is paused; only a running guest moves live: `trimtab vm get {vm.name}` says why"
            return _blocker(vm, Cause.NOT_RUNNING, message, f"trimtab vm resume {vm.name}")
    message = "its state is not known; nothing is moved that was not seen running"
    return _blocker(vm, Cause.STATE_UNKNOWN, message, f"wait until its host is heard of: `trimtab vm get {vm.name}`")


def _blocker(vm: VmSnapshot, cause: Cause, message: str, cure: str) -> Blocker:
    return Blocker(cause=cause, vm_id=vm.vm_id, vm_name=vm.name, host_id=vm.host_id, message=message, cure=cure)
