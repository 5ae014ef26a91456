"""What the failover loop reads of the store in one snapshot, and what records of the pure core that makes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType

from trimtab_controller.core.failover.records import GONE, Desired, Evidence, Holder, HostRecord, Phase, Proof, Seen, VmRecord
from trimtab_controller.core.host_troubles import Trouble, TroubleKind
from trimtab_controller.core.lifecycle import HostConnectivity, ObservedState, OperationState
from trimtab_controller.core.model import Operation
from trimtab_controller.core.model.failover import FailoverControl, FailoverRow, FailoverVmRow, FencePathRow
from trimtab_controller.store import failover, host_guards, hosts, leases, operations, pools
from trimtab_controller.store.database import Session
from trimtab_controller.store.failover import KeptVm
from trimtab_controller.store.host_guards import HostGuard
from trimtab_controller.store.hosts import Standing
from trimtab_controller.store.leases import Lease, Revocation
from trimtab_protos.messages import DomainObservation, DomainState, PoolSpec

_SEEN_BY_STATE = {
    ObservedState.RUNNING: Seen.RUNNING,
    ObservedState.STOPPING: Seen.RUNNING,
    ObservedState.PAUSED: Seen.PAUSED,
    ObservedState.INCOMING: Seen.INCOMING,
    ObservedState.STOPPED: Seen.STOPPED,
    ObservedState.CRASHED: Seen.STOPPED,
    ObservedState.ABSENT: Seen.ABSENT,
}
RESTART = "vm.recover"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One round's view of the store. `live`: the exclusive operation of each vm that has one; `ended`: of open restarts."""

    hosts: Mapping[str, Standing]
    paths: Mapping[str, tuple[FencePathRow, ...]]
    vms: Mapping[str, KeptVm]
    tombstones: frozenset[str]
    starts: tuple[FailoverVmRow, ...]
    operations: Mapping[str, Operation]
    live: Mapping[str, Operation]
    started: Mapping[str, datetime]
    """When those of start groups were last started, whoever led then."""
    records: Mapping[str, FailoverRow]
    revocations: Mapping[str, Revocation]
    gateways: tuple[Lease, ...]
    control: FailoverControl
    guards: Mapping[str, HostGuard]
    session_gateways: Mapping[str, str]
    """Host -> the gateway of its newest session."""
    beacon_pools: Mapping[str, PoolSpec]
    """The pools in which hosts renew besides, by id."""
    beacon_readers: Mapping[str, tuple[str, ...]]
    """Pool -> the live hosts that said lately that they reach it."""
    troubles: Mapping[str, tuple[Trouble, ...]] = field(default_factory=dict)
    """What is wrong with hosts that are up."""
    stranded: frozenset[str] = frozenset()
    """Kept vms that are paused by an I/O error, with disks in a pool that their host has lost."""

    pools: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Where disks of vms lie; only while a host has lost a pool."""

    def lost(self, host_id: str, kind: TroubleKind) -> frozenset[str]:
        """Return the bridges or pools that the host lacks."""
        return frozenset(one.what for one in self.troubles.get(host_id, ()) if one.kind is kind)


def read(
    session: Session,
    *,
    also: Collection[str],
    operation_ids: Collection[str],
    troubles: Mapping[str, tuple[Trouble, ...]] = MappingProxyType({}),
) -> Snapshot:
    """`also`: vms that hosts listed lately; `operation_ids`: restarts whose end is waited for."""
    lost_pools = _lost_pools(troubles)
    stranded = failover.stranded(session, lost_pools)
    paths: dict[str, tuple[FencePathRow, ...]] = {}
    for path in failover.fence_paths(session):
        paths[path.host_id] = (*paths.get(path.host_id, ()), path)
    starts = failover.open_starts(session)
    wanted = {one.operation_id for one in starts if one.operation_id} | set(operation_ids)
    kept = failover.kept_vms(session, also=(*also, *stranded))
    standings, guards = {host.id: host for host in hosts.standings(session)}, host_guards.read_all(session)
    beacon_pools = pools.specs_of(session, {guard.beacon_pool_id for guard in guards.values()} - {""})
    return Snapshot(
        hosts=standings,
        paths=paths,
        vms={vm.id: vm for vm in kept},
        tombstones=failover.tombstones(session, also),
        starts=starts,
        operations={one: operations.get(session, one) for one in wanted},
        live=operations.live_by_subject(session, [vm.id for vm in kept]),
        started=failover.last_started(session, [vm.id for vm in kept if vm.start_group]),
        records={row.host_id: row for row in failover.open_records(session)},
        revocations={one.host_id: one for one in leases.revocations(session)},
        gateways=leases.named(session, leases.GATEWAY_PREFIX),
        control=failover.control(session),
        guards=guards,
        session_gateways=hosts.session_gateways(session),
        beacon_pools=beacon_pools,
        beacon_readers={
            pool_id: tuple(one.host_id for one in places if one.state == "ready" and _is_up(one.host_id, standings))
            for pool_id, places in pools.hosts_of(session, list(beacon_pools)).items()
        },
        troubles=troubles,
        stranded=stranded,
        pools=failover.pools_of(session, [vm.id for vm in kept]) if lost_pools else {},
    )


def _lost_pools(troubles: Mapping[str, tuple[Trouble, ...]]) -> frozenset[tuple[str, str]]:
    """Return (pool, host) of what is lost."""
    return frozenset(
        (one.what, host_id) for host_id, found in troubles.items() for one in found if one.kind is TroubleKind.STORAGE
    )


def _is_up(host_id: str, standings: Mapping[str, Standing]) -> bool:
    return host_id in standings and standings[host_id].connectivity is HostConnectivity.UP


def host_record(host: Standing, seen: Snapshot) -> HostRecord:
    """Return a host as earlier leaders left it; its instants belong to another clock."""
    row, guard = seen.records.get(host.id), seen.guards.get(host.id, HostGuard())
    evidence = tuple(
        Evidence(at_s=0.0, what=str(line["what"]), proof=Proof(line["proof"]) if line.get("proof") else None)
        for line in (row.evidence if row else ())
    )
    return HostRecord(
        id=host.id,
        standing=host.connectivity,
        boot_id=host.boot_id,
        power_paths=tuple(path.name for path in seen.paths.get(host.id, ())),
        was_armed_at_loss=guard.is_armed,
        has_beacon=bool(guard.beacon_pool_id),
        is_armed=guard.is_armed,
        kill_s=guard.kill_ms / 1000,
        evidence=evidence,
        proof=Proof(row.proof) if row and row.proof else None,
        is_cordoned=host.is_cordoned,
        has_listed=True,
    )


def vm_record(row: KeptVm, seen: Snapshot, *, now_s: float) -> VmRecord:
    """Return a vm as held by its home and the target of its migration, or as its recovery left it."""
    own = operations_hold(row, seen)
    vm = VmRecord(
        id=row.id,
        host=row.host_id,
        epoch=row.epoch,
        is_local=row.has_local_disk,
        name=row.name,
        project=row.project_id,
        desired=desired(row),
        seen=seen_of(row),
        seen_s=now_s,
    )
    home = Holder(host=row.host_id, epoch=row.epoch)
    if own and not _is_fenced(row.host_id, seen):
        return replace(vm, phase=Phase.STARTING, holders=(home,), since_s=now_s, seen=Seen.UNKNOWN)
    holders = [home]
    if row.migrating_to and row.migrating_to != row.host_id:
        holders.append(Holder(host=row.migrating_to, epoch=row.epoch + 1))
    left = tuple(one for one in holders if not _is_fenced(one.host, seen) or row.has_local_disk)
    if row.attention:
        return replace(vm, phase=Phase.NEEDS_ATTENTION, holders=left)
    if not left:
        # The last leader fenced its host and died before it began the recovery; or another recovery is under way, to a host that died
        # as well before it could say what it had started. That one would wait for its host: the next supersedes it.
        return replace(vm, phase=Phase.RECOVERING, since_s=now_s, why="waits for a home: its host was fenced")
    return replace(vm, holders=left, phase=Phase.MOVING if len(holders) > 1 else Phase.SETTLED, since_s=now_s)


def operations_hold(row: KeptVm, seen: Snapshot) -> bool:
    """Tell whether a restart of the vm is under way, by whichever leader."""
    live = seen.live.get(row.id)
    is_restarting = live is not None and live.kind == RESTART and live.state is not OperationState.NEEDS_ATTENTION
    return is_restarting or any(one.vm_id == row.id for one in seen.starts)


def _is_fenced(host_id: str, seen: Snapshot) -> bool:
    host = seen.hosts.get(host_id)
    return host is not None and host.connectivity is HostConnectivity.FENCED


def desired(row: KeptVm) -> Desired:
    if row.ha != "restart":
        return Desired.IGNORED
    return Desired.RUNNING if row.desired_power == "running" else Desired.DISABLED


def with_wishes(vm: VmRecord, row: KeptVm, seen: Snapshot, *, now: datetime, now_s: float) -> VmRecord:
    """Return the vm as its owner wants it by now: whether it is kept, how early it starts, and after whom.

    When it was last started is the store's to say: of a guest that runs since long a new leader would else know nothing, and of one
    that the last leader started a moment ago neither.
    """
    started = seen.started.get(vm.id)
    return replace(
        vm,
        desired=desired(row),
        priority=row.priority,
        start_delay_s=row.start_delay_s,
        group=_group_of(vm, row, seen),
        group_order=row.start_order,
        ran_s=vm.ran_s if started is None else now_s - max(0.0, (now - started).total_seconds()),
    )


def _group_of(vm: VmRecord, row: KeptVm, seen: Snapshot) -> str:
    """Return its start group; none while it is off because somebody shut it down: nobody starts it, so nobody waits for it."""
    home = seen.hosts.get(row.host_id)
    is_idle = vm.phase is Phase.SETTLED and home is not None and home.connectivity is HostConnectivity.UP
    is_left_off = seen_of(row) in GONE and row.observed_reason in failover.SHUT_DOWN
    return "" if is_idle and is_left_off else row.start_group


def seen_of(row: KeptVm) -> Seen:
    """Return what was last proven of the vm at its home."""
    if row.observed_host_id != row.host_id:
        return Seen.UNKNOWN
    return _SEEN_BY_STATE.get(ObservedState(row.observed_state), Seen.UNKNOWN)


def seen_from(observation: DomainObservation) -> Seen:
    """Return an agent's answer in the core's words."""
    if observation.state is DomainState.ABSENT:
        return Seen.ABSENT
    return _SEEN_BY_STATE[ObservedState(observation.state.value)]
