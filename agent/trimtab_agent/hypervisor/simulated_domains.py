"""What a simulated host and a simulated guest are made of, and how a guest's process starts and ends.

Functions of this module are called with the fleet's lock held.
"""

import contextlib
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

from trimtab_agent.hypervisor.base import Stamp, restarts_elsewhere
from trimtab_agent.hypervisor.kvm.identifiers import domain_name
from trimtab_agent.hypervisor.simulated_layer_files import disks_of, resolve
from trimtab_agent.hypervisor.simulated_storage import require_disk_keys, require_pool_secrets
from trimtab_agent.hypervisor.simulation import StoredVolume
from trimtab_agent.hypervisor.statistics import BlockStatistics, DomainStatistics, NicStatistics
from trimtab_protos.adoption_messages import DomainDescription
from trimtab_protos.errors import Conflict, NoCapacity, NotFound
from trimtab_protos.messages import (
    DiskFormat,
    DomainObservation,
    DomainSpec,
    DomainState,
    PowerAction,
    StateReason,
)
from trimtab_protos.network_messages import Bridge

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

ACTIVE = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.STOPPING})
"""States in which a guest's process exists and may write."""
IDLE_CPU_SHARE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedHost:
    """What a simulated machine is made of."""

    host_id: str
    hostname: str = ""
    cpus: int = 32
    memory_mib: int = 131_072
    arch: str = "x86_64"
    accelerator: str = "kvm"
    cpu_model: str = "Cascadelake-Server"
    usable_cpu_models: tuple[str, ...] = ("qemu64", "Nehalem", "Westmere", "SandyBridge", "Haswell", "Cascadelake-Server")
    cpu_features: tuple[str, ...] = ()
    machines: tuple[str, ...] = ("pc-q35-7.2", "pc-q35-7.1")
    qemu_version: str = "7.2.0"
    bridges: tuple[Bridge, ...] = (Bridge(name="br0", ports=("eth0",)),)
    has_vlans: bool = True
    """Its kernel makes VLAN devices."""
    migration_address: str = "192.0.2.1"
    overlay_chassis: str = ""
    """OVN's name of it; '': it has none."""
    has_uefi: bool = True
    unmanaged: tuple[DomainObservation, ...] = ()
    lacks: frozenset[str] = frozenset()
    """Capabilities that its agent does not announce: one of an older release."""


@dataclass(slots=True, eq=False)
class SimulatedDomain:
    spec: DomainSpec
    stamp: Stamp
    state: DomainState = DomainState.STOPPED
    reason: StateReason = StateReason.NONE
    is_persistent: bool = True
    is_migrating: bool = False
    asked_for: DomainSpec | None = None
    """What the running guest was last asked to be; `spec` is what it is."""
    starts: int = 0
    started_at_s: float = 0.0
    cpu_time_s: float = 0.0
    console: bytearray = field(default_factory=bytearray)
    console_base: int = 0
    """Bytes of the log that rotation has dropped: offsets go on counting them."""
    open_consoles: list[socket.socket] = field(default_factory=list)
    """The guest's ends of consoles that somebody is at."""
    ports: set[int] = field(default_factory=lambda: {22})
    """TCP ports at which the guest answers; seen only on cards that are on no network."""
    open_layers: dict[str, str] = field(default_factory=dict)
    """Volume id → the layer that the process writes to."""

    own_name: str = ""
    """Of an adopted domain, until it is defined after a stop."""
    original: DomainDescription | None = None

    def write_console(self, text: str) -> None:
        self.console += text.encode()
        excess = len(self.console) - max(self.spec.serial_log_max_bytes, 1)
        if excess > 0:
            del self.console[:excess]
            self.console_base += excess


def define(host: "SimulatedHypervisor", spec: DomainSpec, stamp: Stamp) -> DomainObservation:
    spec = resolve(host, spec)
    known = host.domains.get(spec.vm_id)
    if known is None:
        known = host.domains[spec.vm_id] = SimulatedDomain(spec, stamp)
    if known.own_name and known.state in ACTIVE:
        known.stamp = stamp  # it keeps the definition it was adopted with
        return observation(host, known)
    known.spec, known.stamp, known.is_persistent, known.own_name = spec, stamp, True, ""
    host.state_store(spec).state_files.add(spec.vm_id)
    host.emit("defined", known)
    return observation(host, known)


def act(host: "SimulatedHypervisor", domain: SimulatedDomain, action: PowerAction, stamp: Stamp) -> None:
    if domain.state is DomainState.INCOMING:
        raise Conflict("wrong-domain-state", "the vm is being received from another host; only the migration may end it")
    match action:
        case PowerAction.START:
            _start(host, domain, stamp)
        case PowerAction.FORCE_OFF:
            if domain.state in ACTIVE:
                stop(host, domain, DomainState.STOPPED, StateReason.DESTROYED, kind="stopped")
        case PowerAction.SHUT_DOWN:
            if domain.state in ACTIVE:
                _ask_to_shut_down(host, domain)
        case PowerAction.REBOOT:
            if domain.state is not DomainState.RUNNING:
                raise Conflict("wrong-domain-state", f"the vm is {domain.state.value}, not running")
            domain.write_console(f"GUEST UP {domain.spec.name}\n")
        case PowerAction.RESET:
            _require_active(domain)
            domain.write_console(f"GUEST UP {domain.spec.name}\n")
        case PowerAction.PAUSE:
            _pause(host, domain)
        case PowerAction.RESUME:
            _resume(host, domain)
        case _:
            assert_never(action)


def _start(host: "SimulatedHypervisor", domain: SimulatedDomain, stamp: Stamp) -> None:
    if domain.state in ACTIVE:
        return
    require_disk_keys(host, domain.spec.disks)
    require_pool_secrets(host, domain.spec.pools)
    domain.stamp = stamp
    start_process(host, domain)
    domain.state, domain.reason = DomainState.RUNNING, StateReason.NONE
    host.emit("started", domain)


def _pause(host: "SimulatedHypervisor", domain: SimulatedDomain) -> None:
    _require_active(domain)
    if domain.state is not DomainState.PAUSED:
        domain.state, domain.reason = DomainState.PAUSED, StateReason.USER_PAUSED
        host.emit("paused", domain)


def _resume(host: "SimulatedHypervisor", domain: SimulatedDomain) -> None:
    _require_active(domain)
    if domain.state is not DomainState.PAUSED:
        return
    if domain.is_migrating or domain.reason is StateReason.POSTCOPY_FAILED:
        raise Conflict("migration-under-way", "the vm is paused by a migration; settle that first")
    domain.state, domain.reason = DomainState.RUNNING, StateReason.NONE
    host.emit("resumed", domain)


def _ask_to_shut_down(host: "SimulatedHypervisor", domain: SimulatedDomain) -> None:
    if domain.state is DomainState.PAUSED:
        raise Conflict("wrong-domain-state", "a paused guest cannot shut down; resume it or cut its power")
    if domain.spec.vm_id in host.fleet.stubborn_vms:
        return
    if host.fleet.shutdown_s <= 0:
        stop(host, domain, DomainState.STOPPED, StateReason.GUEST_SHUTDOWN, kind="stopped")
        return
    domain.state = DomainState.STOPPING
    starts = domain.starts

    def finish() -> None:
        with host.fleet.changed:
            if domain.state is DomainState.STOPPING and domain.starts == starts:
                stop(host, domain, DomainState.STOPPED, StateReason.GUEST_SHUTDOWN, kind="stopped")

    host.fleet.clock.call_later(host.fleet.shutdown_s, finish)


def stop(host: "SimulatedHypervisor", domain: SimulatedDomain, state: DomainState, reason: StateReason, *, kind: str) -> None:
    end_process(host, domain)
    domain.state, domain.reason = state, reason
    if not domain.is_persistent:
        host.domains.pop(domain.spec.vm_id, None)
        domain.state = DomainState.ABSENT
    host.emit(kind, domain)


def start_process(host: "SimulatedHypervisor", domain: SimulatedDomain) -> None:
    """Open the disks and begin to run. Conflict(`image-locked`) where another guest has one open."""
    require_memory(host, domain.spec)
    writer = (host.host_id, domain.spec.vm_id)
    volumes = writable_volumes(host, domain.spec)
    for volume in volumes:
        if volume.writer not in {None, writer}:
            raise Conflict("image-locked", f"volume {volume.spec.volume_id} is in use by another QEMU")
    domain.open_layers = {disk.volume_id: layer_id for disk, _volume, layer_id in disks_of(host, domain.spec)}
    for volume in volumes:
        volume.writer = writer
    domain.starts += 1
    domain.started_at_s = host.fleet.clock.boottime_s()
    domain.write_console(f"GUEST UP {domain.spec.name}\n")
    host.fleet.note_start(domain.spec.vm_id, host.host_id, domain.stamp.epoch)


def require_memory(host: "SimulatedHypervisor", spec: DomainSpec) -> None:
    used_mib = sum(other.spec.memory_mib for other in host.domains.values() if other.state in ACTIVE)
    if used_mib + spec.memory_mib > host.host.memory_mib:
        raise NoCapacity("host-out-of-memory", "the host has no memory left for this vm")


def end_process(host: "SimulatedHypervisor", domain: SimulatedDomain) -> None:
    """Close the disks and note the end, where there was a process."""
    if domain.state not in ACTIVE:
        return
    domain.cpu_time_s = cpu_time_s(host, domain)
    for console in domain.open_consoles:
        with contextlib.suppress(OSError):  # whoever was at it has gone already
            console.shutdown(socket.SHUT_RDWR)
    pools = {pool.pool_id: pool for pool in domain.spec.pools}
    for disk in domain.spec.disks:
        # A volume that was deleted meanwhile is a file that only the process still held.
        volume = host.fleet.store(host.host_id, pools[disk.pool_id]).volumes.get(disk.volume_id)
        if volume is not None and volume.writer == (host.host_id, domain.spec.vm_id):
            volume.writer = None
    host.fleet.note_stop(domain.spec.vm_id, host.host_id, domain.stamp.epoch)


def writable_volumes(host: "SimulatedHypervisor", spec: DomainSpec) -> list[StoredVolume]:
    pools = {pool.pool_id: pool for pool in spec.pools}
    found = []
    for disk in spec.disks:
        volume = host.fleet.store(host.host_id, pools[disk.pool_id]).volumes.get(disk.volume_id)
        if volume is None and disk.format is not DiskFormat.ISO:
            raise NotFound("volume-not-found", f"pool {disk.pool_id} has no volume {disk.volume_id}")
        if volume is not None and not disk.is_read_only:
            found.append(volume)
    return found


def has_guest_agent(host: "SimulatedHypervisor", domain: SimulatedDomain) -> bool:
    is_silent = domain.spec.vm_id in host.fleet.silent_agents
    return domain.state is DomainState.RUNNING and host.has_guest_agents and not is_silent


def observation(host: "SimulatedHypervisor", domain: SimulatedDomain) -> DomainObservation:
    spec, is_active = domain.spec, domain.state in ACTIVE
    return DomainObservation(
        vm_id=spec.vm_id,
        uuid=spec.uuid,
        name=domain.own_name or domain_name(spec.vm_id),
        state=domain.state,
        reason=domain.reason,
        epoch=domain.stamp.epoch,
        turn=domain.stamp.turn,
        vcpus=spec.vcpus,
        memory_mib=spec.memory_mib,
        macs=tuple(nic.mac for nic in spec.nics),
        has_guest_agent=has_guest_agent(host, domain),
        addresses=tuple(address for nic in spec.nics for address in nic.addresses) if is_active else (),
        cpu_time_ns=int(cpu_time_s(host, domain) * 1e9),
        observed_at_ms=host.fleet.clock.now_ms(),
        is_persistent=domain.is_persistent,
        is_migrating=domain.is_migrating,
        starts=domain.starts,
        rss_mib=spec.memory_mib if is_active else 0,
        balloon_mib=host.balloons.get(spec.vm_id, spec.memory_mib)
        if is_active and spec.resources and spec.resources.balloon_min_mib
        else 0,
        restarts_elsewhere=restarts_elsewhere(spec),
    )


def statistics(host: "SimulatedHypervisor", domain: SimulatedDomain) -> DomainStatistics:
    """Counters that grow with the time the guest has run, the same for the same time."""
    seconds = int(host.fleet.clock.boottime_s() - domain.started_at_s)
    blocks = tuple(
        BlockStatistics(f"vd{chr(ord('a') + disk.index)}", seconds * 4096, seconds, seconds * 8192, seconds * 2)
        for disk in domain.spec.disks
    )
    nics = tuple(NicStatistics(nic.mac, seconds * 600, seconds * 6, seconds * 300, seconds * 3, 0) for nic in domain.spec.nics)
    return DomainStatistics(domain.spec.vm_id, blocks, nics)


def cpu_time_s(host: "SimulatedHypervisor", domain: SimulatedDomain) -> float:
    if domain.state not in ACTIVE:
        return domain.cpu_time_s
    return domain.cpu_time_s + (host.fleet.clock.boottime_s() - domain.started_at_s) * domain.spec.vcpus * IDLE_CPU_SHARE


def _require_active(domain: SimulatedDomain) -> None:
    if domain.state not in ACTIVE:
        raise Conflict("wrong-domain-state", f"the vm is {domain.state.value}", state=domain.state.value)
