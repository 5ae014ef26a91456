"""A hypervisor in memory: the same promises as the libvirt one (one contract suite runs on both), thread-safe, deterministic,
with the fleet's clock and planned faults. It outlives the agent that uses it, as libvirtd does.
"""

import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from trimtab_agent.hypervisor import (
    simulated_adoption,
    simulated_console,
    simulated_domains,
    simulated_hotplug,
    simulated_images,
    simulated_inventory,
    simulated_layers,
    simulated_migration,
    simulated_moves,
    simulated_storage,
    simulated_wire,
)
from trimtab_agent.hypervisor.base import Applied, DomainChange, JobControl, SourceReader, Stamp
from trimtab_agent.hypervisor.kvm.identifiers import check_id, check_mac, check_marker
from trimtab_agent.hypervisor.simulated_domains import ACTIVE, IDLE_CPU_SHARE, SimulatedDomain, SimulatedHost
from trimtab_agent.hypervisor.simulated_verb import verb
from trimtab_agent.hypervisor.simulation import PoolStore, SimulatedFleet
from trimtab_agent.hypervisor.statistics import DomainStatistics
from trimtab_protos.adoption_messages import AdoptedDisk, Described, DomainDescription
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NotFound, Unavailable
from trimtab_protos.messages import (
    DomainObservation,
    DomainSpec,
    DomainState,
    HostLoad,
    ImageResult,
    ImageSource,
    ImageSpec,
    Inventory,
    JobProgress,
    LayerMerge,
    LayerResult,
    MigrationOptions,
    MigrationResult,
    MigrationSide,
    NetworkKind,
    NetworkSpec,
    PoolObservation,
    PoolSpec,
    PowerAction,
    StateReason,
    VolumeObservation,
    VolumeSpec,
)
from trimtab_protos.network_messages import Bridge, FirewallSpec
from trimtab_protos.volume_messages import VolumeMove


class SimulatedHypervisor:
    """One simulated host. The fields without underscore are for tests and for the modules beside this one."""

    def __init__(self, fleet: SimulatedFleet, host: SimulatedHost, *, reader: SourceReader | None = None) -> None:
        """`reader` brings image sources; without one, imports make up their content, and peers' images are found in the fleet."""
        self.fleet = fleet
        self.host = host
        self.host_id = host.host_id
        self.reader = reader
        self.boot_id = str(uuid.uuid4())
        self.pools: dict[str, PoolSpec] = {}
        self.networks: dict[str, NetworkSpec] = {}
        self.firewalls: dict[str, FirewallSpec] = {}
        self.without_carrier: set[str] = set()
        """Bridges whose uplink is pulled; set by tests."""
        self.older_qemus: dict[str, str] = {}
        """By vm: what its QEMU says of itself, where another is installed by now."""
        self.balloons: dict[str, int] = {}
        """What the balloons of vms with a floor leave them, where it is not all; set by tests."""
        self.has_guest_agents = True
        """Whether its guests, once they run, show an agent; set by tests."""
        self.domains: dict[str, SimulatedDomain] = {}
        self.prepared: dict[str, DomainSpec] = {}
        self.volume_keys: dict[str, str] = {}
        self.migrations: dict[str, simulated_migration.Migration] = {}
        # Domains of others that can be adopted, by UUID; and what ran under those that were ours.
        self.foreign: dict[str, DomainDescription] = {}
        self.released: dict[str, SimulatedDomain] = {}
        self._listeners: list[Callable[[DomainChange], None]] = []
        self._is_up = True
        fleet.hosts[host.host_id] = self

    # The machine, for tests.

    def crash(self) -> None:
        """Cut the machine's power: every guest process is gone, nothing answers until `boot`."""
        with self.fleet.changed:
            self._is_up = False
            self.prepared.clear()
            for domain in list(self.domains.values()):
                simulated_domains.end_process(self, domain)
                if domain.state is DomainState.INCOMING or not domain.is_persistent:
                    del self.domains[domain.spec.vm_id]
                    continue
                domain.state, domain.reason, domain.is_migrating = DomainState.STOPPED, StateReason.HOST_BOOTED, False
            self.fleet.changed.notify_all()

    def boot(self) -> None:
        """Start the machine again: definitions are there, guests are not."""
        with self.fleet.changed:
            self.boot_id = str(uuid.uuid4())
            self._is_up = True
            self.fleet.changed.notify_all()

    def stop_answering(self) -> None:
        """The hypervisor's daemon dies; guests run on."""
        self._is_up = False

    def answer_again(self) -> None:
        self._is_up = True

    def crash_guest(self, vm_id: str) -> None:
        """The guest's process dies by itself."""
        with self.fleet.changed:
            simulated_domains.stop(self, self.domains[vm_id], DomainState.CRASHED, StateReason.CRASHED, kind="crashed")

    def stop_by_hand(self, vm_id: str) -> None:
        """Somebody destroys the domain behind Trimtab's back."""
        with self.fleet.changed:
            simulated_domains.stop(self, self.domains[vm_id], DomainState.STOPPED, StateReason.DESTROYED, kind="stopped")

    def fail_disk(self, vm_id: str) -> None:
        """The guest's disk fails and QEMU pauses it."""
        with self.fleet.changed:
            domain = self.domains[vm_id]
            domain.state, domain.reason = DomainState.PAUSED, StateReason.IO_ERROR
            self.emit("io-error", domain)

    # The host.

    def require_up(self) -> None:
        if not self._is_up:
            raise Unavailable("hypervisor-down", "the hypervisor does not answer")

    @verb
    def inventory(self, *, only_fitness: bool = False) -> Inventory:
        return simulated_inventory.read(self, only_fitness=only_fitness)

    def load(self) -> HostLoad:
        active = [domain for domain in list(self.domains.values()) if domain.state in ACTIVE]
        used_mib = sum(domain.spec.memory_mib for domain in active)
        busy = sum(domain.spec.vcpus for domain in active) * IDLE_CPU_SHARE
        return HostLoad(
            cpu_used_permille=min(1000, int(1000 * busy / self.host.cpus)),
            memory_available_mib=max(0, self.host.memory_mib - used_mib),
            running_domains=len(active),
        )

    def look_at_bridges(self, known: Sequence[Bridge]) -> tuple[Bridge, ...]:
        return tuple(replace(bridge, has_carrier=bridge.name not in self.without_carrier) for bridge in known)

    def is_up(self) -> bool:
        return self._is_up

    def subscribe(self, listener: Callable[[DomainChange], None]) -> None:
        self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[DomainChange], None]) -> None:
        """Forget a listener: an agent that is started anew on this hypervisor brings its own."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    @verb
    def list_domains(self) -> tuple[DomainObservation, ...]:
        with self.fleet.lock:
            unmanaged = simulated_adoption.unmanaged(self)
            return (*(simulated_domains.observation(self, domain) for domain in self.domains.values()), *unmanaged)

    @verb
    def observe_domain(self, vm_id: str) -> DomainObservation:
        check_id(vm_id, "vm_id")
        with self.fleet.lock:
            return self._observe(vm_id)

    @verb
    def read_console(self, vm_id: str, offset: int, max_bytes: int) -> tuple[bytes, int]:
        with self.fleet.lock:
            return simulated_console.read(self.require_domain(vm_id), offset, max_bytes)

    @verb
    def open_console(self, vm_id: str, kind: ConsoleKind) -> socket.socket:
        with self.fleet.lock:
            return simulated_console.join(self, self.require_domain(vm_id), kind)

    @verb
    def open_wire(self, vm_id: str, nic_id: str) -> socket.socket:
        with self.fleet.lock:
            return simulated_wire.join(self.require_domain(vm_id), nic_id)

    @verb
    def domain_statistics(self) -> tuple[DomainStatistics, ...]:
        with self.fleet.lock:
            running = [domain for domain in self.domains.values() if domain.state in ACTIVE]
            return tuple(simulated_domains.statistics(self, domain) for domain in running)

    # Pools.

    @verb
    def ensure_pool(self, pool: PoolSpec) -> PoolObservation:
        check_id(pool.pool_id, "pool_id")
        if not pool.path.startswith("/") or ".." in pool.path.split("/"):
            raise InvalidRequest("pool-path-refused", f"path {pool.path!r} must be absolute, as in /srv/vms", field="path")
        with self.fleet.lock:
            simulated_storage.require_pool_secrets(self, (pool,))
            self.pools[pool.pool_id] = pool
        return simulated_storage.observe_pool(self, pool)

    @verb
    def observe_pool(
        self,
        pool: PoolSpec,
        *,
        known: PoolObservation | None = None,  # noqa: ARG002 a look at everything costs nothing here
    ) -> PoolObservation:
        return simulated_storage.observe_pool(self, pool)

    @verb
    def check_marker(self, pool: PoolSpec, marker: str, write_content: str, remove: bool) -> str:
        check_marker(marker)
        store = self.open_store(pool)
        with self.fleet.lock:
            if remove:
                store.markers.pop(marker, None)
                return ""
            if write_content:
                store.markers[marker] = write_content
            return store.markers.get(marker, "")

    @verb
    def remove_pool(self, pool_id: str) -> None:
        with self.fleet.lock:
            self.pools.pop(pool_id, None)

    # Volumes and images.

    @verb
    def ensure_volume(self, volume: VolumeSpec, pool: PoolSpec) -> VolumeObservation:
        return simulated_storage.make_volume(self, volume, pool)

    @verb
    def observe_volume(self, volume_id: str, pool: PoolSpec) -> VolumeObservation:
        with self.fleet.lock:
            return simulated_storage.observe_volume(volume_id, self.open_store(pool))

    @verb
    def resize_volume(self, volume: VolumeSpec, pool: PoolSpec, vm_id: str) -> VolumeObservation:
        return simulated_hotplug.grow_volume(self, volume, pool, vm_id)

    @verb
    def delete_volume(self, volume_id: str, pool: PoolSpec) -> None:
        simulated_storage.drop_volume(self, volume_id, pool)

    @verb
    def give_volume_keys(self, keys: Mapping[str, str]) -> None:
        with self.fleet.lock:
            self.volume_keys.update(keys)

    @verb
    def require_volume_keys(self, volume_ids: Sequence[str]) -> None:
        with self.fleet.lock:
            simulated_storage.require_keys(self, volume_ids)

    @verb
    def import_image(self, image: ImageSpec, pool: PoolSpec, source: ImageSource, control: JobControl) -> ImageResult:
        return simulated_images.bring(self, image, pool, source=source, control=control)

    @verb
    def open_image(self, image_id: str, pool: PoolSpec) -> str:
        return simulated_images.path_of(self, image_id, pool)

    @verb
    def delete_image(self, image_id: str, pool: PoolSpec) -> None:
        simulated_images.delete(self, image_id, pool)

    # Adoption and networks.

    @verb
    def describe_domain(self, domain: str, vm_id: str) -> Described:
        return simulated_adoption.describe(self, domain, vm_id)

    @verb
    def adopt_domain(self, uuid: str, domain: DomainSpec, disks: Sequence[AdoptedDisk], stamp: Stamp) -> DomainObservation:
        return simulated_adoption.adopt(self, uuid, domain, disks, stamp)

    @verb
    def release_domain(self, domain: DomainSpec, *, has_autostart: bool) -> DomainObservation:
        return simulated_adoption.release(self, domain, has_autostart=has_autostart)

    @verb
    def ensure_network(self, network: NetworkSpec) -> None:
        with self.fleet.lock:
            self.reach_network(network)

    @verb
    def remove_network(self, network_id: str) -> None:
        with self.fleet.lock:
            self.networks.pop(network_id, None)

    @verb
    def set_firewall(self, vm_id: str, firewall: FirewallSpec) -> int:
        with self.fleet.lock:
            if vm_id not in self.firewalls:
                return 0
            return self.keep_firewall(vm_id, firewall)

    # Domains.

    @verb
    def define_domain(self, domain: DomainSpec, stamp: Stamp, *, needs_volumes: bool = False) -> DomainObservation:
        with self.fleet.changed:
            self.check_definition(domain)
            if needs_volumes:
                simulated_domains.writable_volumes(self, domain)
            return simulated_domains.define(self, domain, stamp)

    @verb
    def apply_domain(self, domain: DomainSpec, stamp: Stamp) -> Applied:
        return simulated_hotplug.apply(self, domain, stamp)

    @verb
    def undefine_domain(self, vm_id: str, pools: Sequence[PoolSpec], *, kill_if_running: bool, keep_state_files: bool) -> None:
        check_id(vm_id, "vm_id")
        with self.fleet.changed:
            domain = self.domains.get(vm_id)
            if domain is not None:
                if domain.state in ACTIVE and not kill_if_running:
                    raise Conflict("domain-running", f"vm {vm_id} runs on this host", state=domain.state.value)
                simulated_domains.end_process(self, domain)
                del self.domains[vm_id]
                domain.state, domain.reason = DomainState.ABSENT, StateReason.DESTROYED
                self.emit("undefined", domain)
            self.prepared.pop(vm_id, None)
            self.firewalls.pop(vm_id, None)
            self.balloons.pop(vm_id, None)
            if not keep_state_files:
                for pool in pools:
                    store = self.open_store(pool)
                    store.state_files.discard(vm_id)
                    for key in [key for key in store.memories if key[0] == vm_id]:
                        del store.memories[key]

    @verb
    def change_power(self, vm_id: str, action: PowerAction, stamp: Stamp) -> DomainObservation:
        check_id(vm_id, "vm_id")
        with self.fleet.changed:
            domain = self.require_domain(vm_id)
            simulated_domains.act(self, domain, action, stamp)
            domain.stamp = stamp
            return self._observe(vm_id)

    # Migration.

    @verb
    def prepare_migration(self, domain: DomainSpec, copied_volumes: Sequence[VolumeSpec], source_host_id: str) -> tuple[str, str]:
        return simulated_migration.prepare(self, domain, copied_volumes, source_host_id)

    @verb
    def migrate(
        self,
        vm_id: str,
        target: DomainSpec,
        stamp: Stamp,
        *,
        libvirt_uri: str,
        migration_uri: str,  # noqa: ARG002 links between simulated hosts are by id
        copied_volume_ids: Sequence[str],
        options: MigrationOptions,
        control: JobControl,
    ) -> MigrationResult:
        return simulated_migration.migrate(
            self,
            vm_id,
            target,
            stamp=stamp,
            libvirt_uri=libvirt_uri,
            copied_volume_ids=frozenset(copied_volume_ids),
            options=options,
            control=control,
        )

    @verb
    def settle_migration(
        self, vm_id: str, side: MigrationSide, domain: DomainSpec, removed_volumes: Sequence[VolumeSpec], stamp: Stamp
    ) -> DomainObservation:
        return simulated_migration.settle(self, vm_id, side, domain=domain, removed_volumes=removed_volumes, stamp=stamp)

    # Layers.

    @verb
    def switch_layers(self, domain: DomainSpec, stamp: Stamp, *, wants_freeze: bool) -> LayerResult:
        return simulated_layers.switch(self, domain, stamp, wants_freeze=wants_freeze)

    @verb
    def snapshot_memory(self, domain: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl) -> LayerResult:
        return simulated_layers.snapshot_memory(self, domain, stamp, snapshot_id, control)

    @verb
    def restore_memory(self, domain: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl) -> LayerResult:
        return simulated_layers.restore_memory(self, domain, stamp, snapshot_id, control)

    @verb
    def merge_layer(
        self, merge: LayerMerge, pool: PoolSpec, domain: DomainSpec | None, stamp: Stamp, control: JobControl
    ) -> LayerResult:
        return simulated_layers.merge(self, merge, pool, domain, stamp, control)

    @verb
    def copy_volume(self, volume: VolumeSpec, pool: PoolSpec, control: JobControl) -> LayerResult:
        control.report(JobProgress(phase="copying"))
        return LayerResult(size_bytes=simulated_storage.make_volume(self, volume, pool).size_bytes)

    @verb
    def delete_layer(self, volume_id: str, layer_id: str, pool: PoolSpec) -> None:
        simulated_layers.delete(self, volume_id, layer_id, pool)

    @verb
    def delete_memory(self, vm_id: str, snapshot_id: str, pool: PoolSpec) -> None:
        simulated_layers.delete_memory(self, vm_id, snapshot_id, pool)

    @verb
    def move_volume(self, move: VolumeMove, domain: DomainSpec | None, stamp: Stamp, control: JobControl) -> LayerResult:
        return simulated_moves.move(self, move, domain, stamp, control)

    @verb
    def settle_move(self, move: VolumeMove, domain: DomainSpec | None, stamp: Stamp, *, is_recorded: bool) -> bool:
        return simulated_moves.settle(self, move, domain, stamp, is_recorded=is_recorded)

    # Parts that several verbs share; the caller holds the fleet's lock.

    def require_domain(self, vm_id: str) -> SimulatedDomain:
        domain = self.domains.get(vm_id)
        if domain is None:
            raise NotFound("domain-not-found", f"the host has no domain of vm {vm_id}")
        return domain

    def open_store(self, pool: PoolSpec) -> PoolStore:
        store = self.fleet.store(self.host_id, pool)
        with self.fleet.changed:
            self.fleet.changed.wait_for(lambda: not store.hangs_on(self.host_id))
        return store

    def state_store(self, domain: DomainSpec) -> PoolStore:
        """Where seed and NVRAM lie: the pool of the boot disk."""
        pools = {pool.pool_id: pool for pool in domain.pools}
        first = min(domain.disks, key=lambda disk: disk.index, default=None)
        pool = pools[first.pool_id] if first else PoolSpec(pool_id="pool-none", path="/none")
        return self.open_store(pool)

    def check_definition(self, domain: DomainSpec) -> None:
        """Raise what the hypervisor would: the spec must be possible on this host."""
        check_id(domain.vm_id, "vm_id")
        for nic in domain.nics:
            check_mac(nic.mac)
        if domain.machine not in self.host.machines:
            raise Conflict("not-supported-here", f"this host has no machine type {domain.machine}", machine=domain.machine)
        if domain.cpu_model not in self.host.usable_cpu_models:
            raise Conflict("cpu-incompatible", f"this host cannot run CPU model {domain.cpu_model}", cpu_model=domain.cpu_model)
        for other in self.domains.values():
            if other.spec.vm_id != domain.vm_id and other.spec.uuid == domain.uuid:
                raise AlreadyExists("domain-exists", "another domain has this UUID", vm_id=other.spec.vm_id)
        for network in domain.networks:
            self.reach_network(network)
        pools = {pool.pool_id: pool for pool in domain.pools}
        simulated_images.require_medium(self, domain)
        for disk in domain.disks:
            if disk.pool_id not in pools:
                raise InvalidRequest("pool-missing", f"disk {disk.volume_id} names pool {disk.pool_id}, which the spec lacks")
        self.keep_firewall(domain.vm_id, domain.firewall or FirewallSpec(generation=0))

    def keep_firewall(self, vm_id: str, firewall: FirewallSpec) -> int:
        """Put it in force unless a newer one is; return the generation that is."""
        known = self.firewalls.get(vm_id)
        if known is None or known.generation <= firewall.generation:
            known = self.firewalls[vm_id] = firewall
        return known.generation

    def reach_network(self, network: NetworkSpec) -> None:
        if network.kind is NetworkKind.WIRE:
            return  # there is none
        if network.kind is NetworkKind.BRIDGE:
            bridge = next((bridge for bridge in self.host.bridges if bridge.name == network.bridge), None)
            if bridge is None:
                raise Conflict("bridge-missing", f"the host has no bridge {network.bridge}", bridge=network.bridge)
            if bridge.mtu < network.mtu:
                raise Conflict("bridge-mtu-too-small", f"bridge {bridge.name} has MTU {bridge.mtu}, the network {network.mtu}")
            if network.vlan and not self.host.has_vlans:
                raise Conflict("vlan-not-supported", f"this host makes no VLAN {network.vlan} on bridge {network.bridge}")
        if (network.kind is NetworkKind.OVERLAY or network.is_outer) and not self.host.overlay_chassis:
            raise Conflict("overlay-not-set-up", f"network {network.name}: Open vSwitch of this host lacks ovn-remote for OVN")
        self.networks[network.network_id] = network

    def emit(self, kind: str, domain: SimulatedDomain) -> None:
        change = DomainChange(kind, simulated_domains.observation(self, domain))
        for listener in list(self._listeners):
            listener(change)
        self.fleet.changed.notify_all()

    # Private parts.

    def _observe(self, vm_id: str) -> DomainObservation:
        domain = self.domains.get(vm_id)
        if domain is None:
            return DomainObservation(vm_id=vm_id, observed_at_ms=self.fleet.clock.now_ms())
        return simulated_domains.observation(self, domain)


__all__ = ["ACTIVE", "SimulatedDomain", "SimulatedHost", "SimulatedHypervisor"]
