"""Live migration between simulated hosts: the guest's process is on the source until one instant, then on the target.

    prepared ── migrate ──► copying (target: INCOMING) ── switched ──► source stopped as migrated, target running
                               └─ cancelled, cut, crashed: source runs on, target as before

The migration belongs to the hosts, not to the caller: an agent that comes back attaches to it, as to libvirt's peer-to-peer one.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor.base import JobControl, Stamp
from trimtab_agent.hypervisor.simulated_domains import (
    SimulatedDomain,
    end_process,
    observation,
    require_memory,
    start_process,
    writable_volumes,
)
from trimtab_agent.hypervisor.simulated_layer_files import content, disks_of, layer_of
from trimtab_agent.hypervisor.simulated_storage import drop_volume, make_volume, require_disk_keys
from trimtab_agent.hypervisor.simulation import FaultKind
from trimtab_protos.errors import Conflict, DeadlineExceeded, InvalidRequest, TrimtabError, Unavailable
from trimtab_protos.messages import (
    DomainObservation,
    DomainSpec,
    DomainState,
    JobProgress,
    MigrationOptions,
    MigrationResult,
    MigrationSide,
    StateReason,
    VolumeSpec,
)
from trimtab_protos.network_messages import FirewallSpec

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

DOWNTIME_MS = 40
MIB = 1 << 20
_SLICE_S = 0.05
"""How often a running migration looks whether it was cancelled or cut."""
_URI = re.compile(r"simulated://([0-9a-z-]+)/system")


@dataclass(slots=True, eq=False)
class Migration:
    """One under way; whoever calls `migrate` meanwhile waits for `ended`."""

    control: JobControl
    ended: threading.Event = field(default_factory=threading.Event)
    result: MigrationResult | None = None
    error: TrimtabError | None = None
    attached: int = 0
    """Callers that came while it was under way."""


def prepare(
    host: "SimulatedHypervisor", domain: DomainSpec, copied_volumes: Sequence[VolumeSpec], source_host_id: str
) -> tuple[str, str]:
    with host.fleet.changed:
        if source_host_id == host.host_id:
            raise Conflict("migration-to-itself", "source and target are the same host")
        known = host.domains.get(domain.vm_id)
        if known is not None and known.state not in {DomainState.INCOMING, DomainState.STOPPED, DomainState.CRASHED}:
            raise Conflict("domain-runs-here", f"vm {domain.vm_id} already runs on this host", state=known.state.value)
        host.check_definition(domain)
        require_disk_keys(host, domain.disks)
        pools = {pool.pool_id: pool for pool in domain.pools}
        for volume in copied_volumes:
            if volume.pool_id not in pools:
                raise InvalidRequest("pool-missing", f"volume {volume.volume_id} names a pool that the spec lacks")
            make_volume(host, volume, pools[volume.pool_id])
        writable_volumes(host, domain)  # every disk is here, shared or copied
        host.prepared[domain.vm_id] = domain
    return f"simulated://{host.host_id}/system", f"tcp://{host.host.migration_address}"


def migrate(
    host: "SimulatedHypervisor",
    vm_id: str,
    target_spec: DomainSpec,
    *,
    stamp: Stamp,
    libvirt_uri: str,
    copied_volume_ids: frozenset[str],
    options: MigrationOptions,
    control: JobControl,
) -> MigrationResult:
    with host.fleet.changed:
        running = host.migrations.get(vm_id)
        if running is not None:
            running.attached += 1
        else:
            target, domain = _check(host, vm_id, libvirt_uri, target_spec=target_spec, copied_volume_ids=copied_volume_ids)
            mine = host.migrations[vm_id] = Migration(control)
            _begin(host, target, domain, target_spec=target_spec, stamp=stamp)
    if running is not None:
        return _attach(running, control)
    try:
        mine.result = _copy_and_switch(
            host, target, domain, target_spec=target_spec, stamp=stamp, options=options, migration=mine
        )
    except TrimtabError as error:
        mine.error = error
        with host.fleet.changed:
            _give_up(host, target, domain)
        raise
    finally:
        with host.fleet.changed:
            host.migrations.pop(vm_id, None)
            mine.ended.set()
    _meet(host, "migrate.switched")
    return mine.result


def settle(
    host: "SimulatedHypervisor",
    vm_id: str,
    side: MigrationSide,
    *,
    domain: DomainSpec,
    removed_volumes: Sequence[VolumeSpec],
    stamp: Stamp,
) -> DomainObservation:
    with host.fleet.changed:
        known = host.domains.get(vm_id)
        if known is not None and (known.is_migrating or known.state is DomainState.INCOMING):
            raise Conflict("migration-under-way", f"the migration of vm {vm_id} has not ended on this host")
        host.prepared.pop(vm_id, None)
        if side is MigrationSide.KEEP:
            if known is None:
                raise Conflict("domain-absent", f"vm {vm_id} does not live on this host")
            known.spec, known.stamp, known.is_persistent = domain, stamp, True
            host.keep_firewall(vm_id, domain.firewall or FirewallSpec(generation=0))
            return observation(host, known)
        if known is not None and known.state not in {DomainState.STOPPED, DomainState.CRASHED}:
            raise Conflict("domain-runs-here", f"vm {vm_id} runs on this host", state=known.state.value)
        host.domains.pop(vm_id, None)
        host.firewalls.pop(vm_id, None)
        pools = {pool.pool_id: pool for pool in domain.pools}
        for volume in removed_volumes:
            pool = pools.get(volume.pool_id)
            if pool is not None and not pool.is_shared:
                drop_volume(host, volume.volume_id, pool)
        return DomainObservation(vm_id=vm_id, observed_at_ms=host.fleet.clock.now_ms())


# Steps of one migration.


def _check(
    host: "SimulatedHypervisor", vm_id: str, libvirt_uri: str, *, target_spec: DomainSpec, copied_volume_ids: frozenset[str]
) -> "tuple[SimulatedHypervisor, SimulatedDomain]":
    domain = host.require_domain(vm_id)
    if domain.state not in {DomainState.RUNNING, DomainState.PAUSED}:
        raise Conflict("wrong-domain-state", f"the vm is {domain.state.value}", state=domain.state.value)
    address = _URI.fullmatch(libvirt_uri)
    if address is None:
        raise InvalidRequest("uri-refused", f"{libvirt_uri!r} is not a simulated host", field="libvirt_uri")
    target = host.fleet.require_link(host.host_id, address[1])
    if vm_id not in target.prepared:
        raise Conflict("target-not-prepared", f"host {target.host_id} was not prepared for vm {vm_id}")
    is_shared = {pool.pool_id: pool.is_shared for pool in target_spec.pools}
    for disk in target_spec.disks:
        if disk.volume_id not in copied_volume_ids and not is_shared.get(disk.pool_id, False):
            raise Conflict("migration-unsafe", f"disk {disk.volume_id} is neither shared nor to be copied")
    return target, domain


def _begin(
    host: "SimulatedHypervisor",
    target: "SimulatedHypervisor",
    domain: SimulatedDomain,
    *,
    target_spec: DomainSpec,
    stamp: Stamp,
) -> None:
    domain.is_migrating = True
    target.domains[domain.spec.vm_id] = SimulatedDomain(
        target_spec, stamp, state=DomainState.INCOMING, is_persistent=False, is_migrating=True, console=bytearray(domain.console)
    )
    host.fleet.changed.notify_all()


def _attach(running: Migration, control: JobControl) -> MigrationResult:
    while not running.ended.wait(_SLICE_S):
        if control.cancelled.is_set():
            running.control.cancelled.set()
    if running.error is not None:
        raise running.error
    assert running.result is not None
    return running.result


def _copy_and_switch(
    host: "SimulatedHypervisor",
    target: "SimulatedHypervisor",
    domain: SimulatedDomain,
    *,
    target_spec: DomainSpec,
    stamp: Stamp,
    options: MigrationOptions,
    migration: Migration,
) -> MigrationResult:
    clock = host.fleet.clock
    began_s = clock.boottime_s()
    total = domain.spec.memory_mib * MIB
    _meet(host, "migrate.copying")
    _copy(host, target, total=total, options=options, migration=migration)
    with host.fleet.changed:
        _check_still_possible(host, target, domain, migration)
        _switch(host, target, domain, target_spec=target_spec, stamp=stamp, is_flattened=options.is_flattened)
    return MigrationResult(
        total_ms=int((clock.boottime_s() - began_s) * 1000) + DOWNTIME_MS, downtime_ms=DOWNTIME_MS, transferred_bytes=total
    )


def _copy(
    host: "SimulatedHypervisor",
    target: "SimulatedHypervisor",
    *,
    total: int,
    options: MigrationOptions,
    migration: Migration,
) -> None:
    rate = options.bandwidth_mib_s * MIB or host.fleet.memory_rate_bytes_s
    done, spent_s = 0, 0.0
    while rate and done < total:
        host.fleet.clock.sleep(_SLICE_S)
        spent_s += _SLICE_S
        done = min(total, done + int(rate * _SLICE_S))
        migration.control.report(
            JobProgress(
                done_bytes=done,
                total_bytes=total,
                rate_bytes_s=rate,
                phase="copying memory",
                remaining_s=(total - done) // rate,
            )
        )
        if options.timeout_s and spent_s > options.timeout_s:
            raise Conflict("migration-timeout", f"the migration did not end within {options.timeout_s} s")
        with host.fleet.lock:
            _check_link(host, target, migration)


def _check_link(host: "SimulatedHypervisor", target: "SimulatedHypervisor", migration: Migration) -> None:
    if migration.control.cancelled.is_set():
        raise Conflict("job-cancelled", "the migration was cancelled")
    try:
        host.fleet.require_link(host.host_id, target.host_id)
    except Unavailable as error:
        raise _peer_lost() from error
    if not host.is_up():
        raise _peer_lost()


def _peer_lost() -> DeadlineExceeded:
    return DeadlineExceeded("migration-peer-lost", "a host went away during the migration; look at both")


def _check_still_possible(
    host: "SimulatedHypervisor", target: "SimulatedHypervisor", domain: SimulatedDomain, migration: Migration
) -> None:
    _check_link(host, target, migration)
    vm_id = domain.spec.vm_id
    if host.domains.get(vm_id) is not domain or domain.state not in {DomainState.RUNNING, DomainState.PAUSED}:
        raise Conflict("domain-gone", "the guest ended on the source while it was copied")
    incoming = target.domains.get(vm_id)
    if incoming is None or incoming.state is not DomainState.INCOMING:
        raise _peer_lost()


def _switch(
    host: "SimulatedHypervisor",
    target: "SimulatedHypervisor",
    domain: SimulatedDomain,
    *,
    target_spec: DomainSpec,
    stamp: Stamp,
    is_flattened: bool,
) -> None:
    """Hand the guest over. Under the fleet's lock, so that nobody ever sees two or none."""
    vm_id, state, reason = domain.spec.vm_id, domain.state, domain.reason
    arrived = target.domains[vm_id]
    # Whatever can fail on the target, before the source lets go.
    require_memory(target, target_spec)
    writable_volumes(target, target_spec)
    _copy_content(host, target, target_spec, is_flattened=is_flattened)
    end_process(host, domain)
    # The definition stays until the side is settled, as libvirt leaves it.
    domain.state, domain.reason, domain.is_migrating = DomainState.STOPPED, StateReason.MIGRATED, False
    start_process(target, arrived)
    arrived.console = domain.console
    arrived.spec, arrived.stamp = target_spec, stamp
    arrived.state, arrived.reason = state, reason
    arrived.starts = domain.starts
    arrived.is_persistent, arrived.is_migrating = True, False
    target.prepared.pop(vm_id, None)
    target.emit("migrated", arrived)
    host.emit("migrated", domain)


def _copy_content(host: "SimulatedHypervisor", target: "SimulatedHypervisor", spec: DomainSpec, *, is_flattened: bool) -> None:
    """Give disks that are not shared their content: that of the top layer, or of all of them."""
    pools = {pool.pool_id: pool for pool in spec.pools}
    for disk, volume, layer_id in disks_of(target, spec):
        pool = pools[disk.pool_id]
        if pool.is_shared:
            continue
        store = host.fleet.store(host.host_id, pool)
        top = layer_of(store, disk.volume_id, layer_id).marks
        volume.layers[layer_id].marks = set(content(store, disk.volume_id, layer_id) if is_flattened else top)


def _give_up(host: "SimulatedHypervisor", target: "SimulatedHypervisor", domain: SimulatedDomain) -> None:
    domain.is_migrating = False
    incoming = target.domains.get(domain.spec.vm_id)
    if incoming is not None and incoming.state is DomainState.INCOMING:
        del target.domains[domain.spec.vm_id]
    host.fleet.changed.notify_all()


def _meet(host: "SimulatedHypervisor", point: str) -> None:
    fault = host.fleet.take_fault(host.host_id, point)
    if fault is None:
        return
    if fault.kind is FaultKind.HANG:
        fault.released.wait()
        return
    raise fault.error
