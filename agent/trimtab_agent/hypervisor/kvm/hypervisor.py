"""The libvirt implementation of `Hypervisor`: puts the parts together and says which verb is whose."""

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab_agent.ballooning import Rules
from trimtab_agent.hypervisor.base import Applied, DomainChange, JobControl, SourceReader, Stamp
from trimtab_agent.hypervisor.kvm import (
    accel_probe,
    block_pools,
    domain_facts,
    host_links,
    images,
    layer_files,
    rbd_layers,
    volumes,
)
from trimtab_agent.hypervisor.kvm.adoption import Adoption
from trimtab_agent.hypervisor.kvm.backup_hooks import GuestHooks
from trimtab_agent.hypervisor.kvm.backups import SOCKET_DIR, Backups
from trimtab_agent.hypervisor.kvm.ballooning import Balloons
from trimtab_agent.hypervisor.kvm.config import KvmConfig
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.console import ConsoleLogs
from trimtab_agent.hypervisor.kvm.consoles import ConsoleSockets
from trimtab_agent.hypervisor.kvm.domains import Domains, require_volumes, write_stamp
from trimtab_agent.hypervisor.kvm.events import DomainEvents
from trimtab_agent.hypervisor.kvm.firewall import Firewall
from trimtab_agent.hypervisor.kvm.freezes import GuestFreezes
from trimtab_agent.hypervisor.kvm.host_load import HostLoadReader
from trimtab_agent.hypervisor.kvm.hotplug import Hotplug
from trimtab_agent.hypervisor.kvm.housekeeping import Housekeeping, LeftBehind
from trimtab_agent.hypervisor.kvm.instants import Instants
from trimtab_agent.hypervisor.kvm.inventory import InventoryReader, read_boot_id
from trimtab_agent.hypervisor.kvm.layers import Layers
from trimtab_agent.hypervisor.kvm.migration import Migrations
from trimtab_agent.hypervisor.kvm.moves import Moves
from trimtab_agent.hypervisor.kvm.networks import Networks
from trimtab_agent.hypervisor.kvm.observe import Observer
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_agent.hypervisor.kvm.pools import Pools
from trimtab_agent.hypervisor.kvm.power import Power
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_agent.hypervisor.statistics import BalloonStatistics
from trimtab_protos.adoption_messages import AdoptedDisk, Described
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.messages import (
    DiskFormat,
    DomainObservation,
    DomainSpec,
    HostLoad,
    ImageResult,
    ImageSource,
    ImageSpec,
    Inventory,
    LayerMerge,
    LayerResult,
    MigrationOptions,
    MigrationResult,
    MigrationSide,
    NetworkSpec,
    PoolKind,
    PoolObservation,
    PoolSpec,
    PowerAction,
    VolumeObservation,
    VolumeSpec,
)
from trimtab_protos.network_messages import Bridge, FirewallSpec
from trimtab_protos.volume_messages import VolumeMove


class KvmHypervisor:
    """This host's libvirt as a `Hypervisor`. Every method may be called from any thread; `start` must come first."""

    def __init__(self, config: KvmConfig, reader: SourceReader) -> None:
        """`reader` fetches image sources; nothing is opened before `start`."""
        self._config = config
        self._reader = reader
        boot_id = read_boot_id()
        self._boot_id = boot_id
        self._observer = Observer(boot_id)
        self._logs = ConsoleLogs(config.log_dir)
        self._events = DomainEvents(self._observer, on_stopped=self._clear_boot_mark)
        self._connection = Connection(config.libvirt_uri, on_open=self._events.register, on_up=self._events.resync)
        self._load = HostLoadReader()
        self._networks = Networks(self._connection)
        self._firewall = Firewall(config.runtime_dir / "firewall")
        self._keys = VolumeKeys()
        self._pools = Pools(self._connection, self._keys)
        self._inventory = InventoryReader(config, self._connection, boot_id=boot_id, accelerator=self.accelerator)
        self._domains = Domains(
            self._connection,
            self._observer,
            self._logs,
            ConsoleSockets(config.runtime_dir),
            self._firewall,
            accelerator=self.accelerator,
            refuse_unfit=self._inventory.refuse_unfit,
        )
        self._pauses = GuestPauses(SOCKET_DIR)
        freezes, hooks = GuestFreezes(SOCKET_DIR), GuestHooks(SOCKET_DIR)
        self._power = Power(
            self._connection, self._domains, self._observer, self._networks, self._keys, self._pauses, boot_id=boot_id
        )
        self._hotplug = Hotplug(self._connection, self._domains, self._observer, self._networks, self._keys)
        self._migrations = Migrations(
            config,
            self._connection,
            self._domains,
            self._observer,
            self._networks,
            self._firewall,
            self._pools,
            self._logs,
            self._inventory,
            self._keys,
            boot_id=boot_id,
        )
        self._adoption = Adoption(self._connection, self._domains, self._observer, boot_id=boot_id)
        self._layers = Layers(self._connection, self._domains, self._networks, self._keys, freezes, boot_id=boot_id)
        self._moves = Moves(self._connection, self._domains)
        self._instants = Instants(self._connection, self._domains, self._pauses, socket_dir=SOCKET_DIR)
        self.backups = Backups(
            self._connection,
            refuse_if_used=self._domains.refuse_if_used,
            instants=self._instants,
            keys=self._keys,
            pauses=self._pauses,
            freezes=freezes,
            hooks=hooks,
        )
        """What backups copy from; apart from the verbs, since a backup is read for as long as its block is open."""
        rules = Rules(low_permille=config.balloon_low_permille, high_permille=config.balloon_high_permille)
        self._balloons = Balloons(self._connection, self._load, rules)
        left = LeftBehind(self._pauses, freezes, hooks, self.backups.jobs)
        self._housekeeping = Housekeeping(self._connection, self._observer, self._logs, self._firewall, self._balloons, left)

    def start(self) -> None:
        """Open the connection and keep it open from now on; returns at once, also where libvirt is down."""
        self._connection.start()
        self._events.start(self._connection)
        self._housekeeping.start()

    def stop(self) -> None:
        """Let go of libvirt; guests run on."""
        self._housekeeping.stop()
        self._events.stop()
        self._connection.stop()

    def wait_until_up(self, timeout_s: float) -> bool:
        """Tell whether libvirt answers within the time."""
        return self._connection.wait_until_up(timeout_s)

    def accelerator(self) -> str:
        """Return `kvm` or `tcg`, whichever really runs guests here; the first call of a boot takes up to 2 s."""
        return accel_probe.accelerator(self._config.runtime_dir, self._boot_id)

    # --- what is there ---------------------------------------------------------------------------------------------------

    def inventory(self, *, only_fitness: bool = False) -> Inventory:
        return self._inventory.read(only_fitness=only_fitness)

    def load(self) -> HostLoad:
        return self._load.read(running_domains=self._housekeeping.running_domains)

    def look_at_bridges(self, known: Sequence[Bridge]) -> tuple[Bridge, ...]:
        return host_links.look_again(known)

    def balloon_statistics(self) -> tuple[BalloonStatistics, ...]:
        return self._balloons.statistics()

    def balloon_changes(self) -> Mapping[str, int]:
        return self._balloons.changes()

    def is_up(self) -> bool:
        return self._connection.is_up

    def subscribe(self, listener: Callable[[DomainChange], None]) -> None:
        self._events.subscribe(listener)

    def list_domains(self) -> tuple[DomainObservation, ...]:
        return self._domains.list()

    def observe_domain(self, vm_id: str) -> DomainObservation:
        return self._domains.observe(vm_id)

    def read_console(self, vm_id: str, offset: int, max_bytes: int) -> tuple[bytes, int]:
        return self._logs.read(vm_id, offset, max_bytes)

    def open_console(self, vm_id: str, kind: ConsoleKind) -> socket.socket:
        return self._domains.open_console(vm_id, kind)

    def open_wire(self, vm_id: str, nic_id: str) -> socket.socket:
        return self._domains.open_wire(vm_id, nic_id)

    # --- storage -----------------------------------------------------------------------------------------------------------

    def ensure_pool(self, pool: PoolSpec) -> PoolObservation:
        return self._pools.ensure(pool)

    def observe_pool(self, pool: PoolSpec, *, known: PoolObservation | None = None) -> PoolObservation:
        return self._pools.observe(pool, known=known)

    def check_marker(self, pool: PoolSpec, marker: str, write_content: str, remove: bool) -> str:
        return self._pools.check_marker(pool, marker, write_content=write_content, remove=remove)

    def remove_pool(self, pool_id: str) -> None:
        self._pools.remove(pool_id)

    def ensure_volume(self, volume: VolumeSpec, pool: PoolSpec) -> VolumeObservation:
        if block_pools.is_block(pool):
            return block_pools.ensure_volume(volume, pool, self._keys.of_pool(pool))
        key = self._keys.of_volume(volume)
        return volumes.ensure(volume, self._pools.require_responsive(pool), key=key)

    def observe_volume(self, volume_id: str, pool: PoolSpec) -> VolumeObservation:
        return volumes.observe(volume_id, self._pools.require_responsive(pool))

    def resize_volume(self, volume: VolumeSpec, pool: PoolSpec, vm_id: str) -> VolumeObservation:
        if block_pools.is_block(pool):
            return self._hotplug.grow_block(volume, pool, vm_id)
        return self._hotplug.grow_volume(volume, self._pools.require_responsive(pool), vm_id)

    def delete_volume(self, volume_id: str, pool: PoolSpec) -> None:
        if block_pools.is_block(pool):
            volume = VolumeSpec(volume_id=volume_id, pool_id=pool.pool_id, format=DiskFormat.RAW, size_bytes=0)
            self._domains.refuse_if_plugged(volume_id)
            block_pools.delete_volume(volume, pool, None if pool.kind is PoolKind.ISCSI else self._keys.of_pool(pool))
            return
        layout = self._pools.require_responsive(pool)
        self._domains.refuse_if_used(volumes.names_of(volume_id, layout), f"volume {volume_id}")
        volumes.refuse_if_below(volume_id, layout)
        self._instants.forget(volume_id)
        volumes.delete(volume_id, layout)
        self._keys.forget((volume_id,))

    def give_volume_keys(self, keys: Mapping[str, str]) -> None:
        self._keys.give(keys)

    def require_volume_keys(self, volume_ids: Sequence[str]) -> None:
        self._keys.require(volume_ids)

    def import_image(self, image: ImageSpec, pool: PoolSpec, source: ImageSource, control: JobControl) -> ImageResult:
        return images.import_image(
            image, pool, self._pools.require_responsive(pool), source, reader=self._reader, control=control
        )

    def open_image(self, image_id: str, pool: PoolSpec) -> str:
        return images.path_of(image_id, self._pools.require_responsive(pool))

    def delete_image(self, image_id: str, pool: PoolSpec) -> None:
        images.delete(image_id, self._pools.require_responsive(pool))

    # --- networks ------------------------------------------------------------------------------------------------------------

    def ensure_network(self, network: NetworkSpec) -> None:
        self._networks.ensure(network)

    def remove_network(self, network_id: str) -> None:
        self._networks.remove(network_id)

    def set_firewall(self, vm_id: str, firewall: FirewallSpec) -> int:
        return self._firewall.set(vm_id, firewall)

    # --- domains -----------------------------------------------------------------------------------------------------------

    def define_domain(self, domain: DomainSpec, stamp: Stamp, *, needs_volumes: bool = False) -> DomainObservation:
        self._require_responsive(domain.pools)
        if needs_volumes:
            require_volumes(domain)
        self._layers.refuse_half(domain)
        self._networks.ensure_for(domain)
        return self._domains.define(domain, stamp)

    def apply_domain(self, domain: DomainSpec, stamp: Stamp) -> Applied:
        self._require_responsive(domain.pools)
        self._networks.ensure_for(domain)
        return self._hotplug.apply(domain, stamp)

    def undefine_domain(self, vm_id: str, pools: Sequence[PoolSpec], *, kill_if_running: bool, keep_state_files: bool) -> None:
        self._domains.undefine(vm_id, pools, kill_if_running=kill_if_running, keep_state_files=keep_state_files)

    def change_power(self, vm_id: str, action: PowerAction, stamp: Stamp) -> DomainObservation:
        return self._power.change(vm_id, action, stamp)

    # --- adoption ----------------------------------------------------------------------------------------------------------

    def describe_domain(self, domain: str, vm_id: str) -> Described:
        return self._adoption.describe(domain, vm_id)

    def adopt_domain(self, uuid: str, domain: DomainSpec, disks: Sequence[AdoptedDisk], stamp: Stamp) -> DomainObservation:
        self._require_responsive(domain.pools)
        return self._adoption.adopt(uuid, domain, disks, stamp)

    def release_domain(self, domain: DomainSpec, *, has_autostart: bool) -> DomainObservation:
        self._require_responsive(domain.pools)
        return self._adoption.release(domain, has_autostart=has_autostart)

    # --- migration -----------------------------------------------------------------------------------------------------------

    def prepare_migration(self, domain: DomainSpec, copied_volumes: Sequence[VolumeSpec], source_host_id: str) -> tuple[str, str]:
        self._require_responsive(domain.pools)
        return self._migrations.prepare(domain, copied_volumes, source_host_id=source_host_id)

    def migrate(
        self,
        vm_id: str,
        target: DomainSpec,
        stamp: Stamp,
        *,
        libvirt_uri: str,
        migration_uri: str,
        copied_volume_ids: Sequence[str],
        options: MigrationOptions,
        control: JobControl,
    ) -> MigrationResult:
        return self._migrations.migrate(
            vm_id,
            target,
            stamp,
            libvirt_uri=libvirt_uri,
            migration_uri=migration_uri,
            copied_volume_ids=copied_volume_ids,
            options=options,
            control=control,
        )

    def settle_migration(
        self, vm_id: str, side: MigrationSide, domain: DomainSpec, removed_volumes: Sequence[VolumeSpec], stamp: Stamp
    ) -> DomainObservation:
        self._require_responsive(domain.pools)
        return self._migrations.settle(vm_id, side, domain, removed_volumes, stamp)

    # --- layers ------------------------------------------------------------------------------------------------------------

    def switch_layers(self, domain: DomainSpec, stamp: Stamp, *, wants_freeze: bool) -> LayerResult:
        self._require_responsive(domain.pools)
        self._networks.ensure_for(domain)
        return self._layers.switch(domain, stamp, wants_freeze=wants_freeze)

    def snapshot_memory(self, domain: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl) -> LayerResult:
        self._require_responsive(domain.pools)
        return self._layers.save_memory(domain, stamp, snapshot_id, control)

    def restore_memory(self, domain: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl) -> LayerResult:
        self._require_responsive(domain.pools)
        self._firewall.ensure(domain)
        return self._layers.restore_memory(domain, stamp, snapshot_id, control)

    def merge_layer(
        self, merge: LayerMerge, pool: PoolSpec, domain: DomainSpec | None, stamp: Stamp, control: JobControl
    ) -> LayerResult:
        self._require_responsive((pool,))
        return self._layers.merge(merge, pool, domain, stamp, control)

    def copy_volume(self, volume: VolumeSpec, pool: PoolSpec, control: JobControl) -> LayerResult:
        self._require_responsive((pool,))
        return self._layers.copy(volume, pool, control)

    def delete_layer(self, volume_id: str, layer_id: str, pool: PoolSpec) -> None:
        if rbd_layers.has_layers(pool):
            self._layers.delete(volume_id, layer_id, pool)
            return
        layout = self._pools.require_responsive(pool)
        path = layout.volume(volume_id, DiskFormat.QCOW2, layer_id)
        self._domains.refuse_if_used((path,), f"layer {layer_id} of volume {volume_id}")
        layer_files.delete(volume_id, layer_id, layout)

    def delete_memory(self, vm_id: str, snapshot_id: str, pool: PoolSpec) -> None:
        self._pools.require_responsive(pool)
        layer_files.delete_memory(vm_id, snapshot_id, pool)

    # --- moves between pools -----------------------------------------------------------------------------------------------

    def move_volume(self, move: VolumeMove, domain: DomainSpec | None, stamp: Stamp, control: JobControl) -> LayerResult:
        self._require_responsive(_pools_of(move, domain))
        return self._moves.move(move, domain, stamp, control)

    def settle_move(self, move: VolumeMove, domain: DomainSpec | None, stamp: Stamp, *, is_recorded: bool) -> bool:
        self._require_responsive(_pools_of(move, domain))
        return self._moves.settle(move, domain, stamp, is_recorded=is_recorded)

    def _require_responsive(self, pools: Sequence[PoolSpec]) -> None:
        """Fail before a vm's lock is taken: who holds it must not hang with the storage."""
        self._pools.require_there(pools)

    def _clear_boot_mark(self, domain: Any) -> None:
        """Take the mark off a domain that was seen to stop: should the host boot later, that is not why it is off."""
        vm_id = domain_facts.read(domain.XMLDesc(0)).vm_id
        if not vm_id:
            return
        # Under the lock and on fresh facts: a start that runs right now must not lose its stamp to this.
        with self._domains.locks.hold(vm_id):
            facts = domain_facts.read(domain.XMLDesc(0))
            if facts.vm_id and facts.boot_id and domain.isPersistent() and not domain.isActive():
                write_stamp(domain, facts, Stamp(epoch=facts.epoch, turn=facts.turn), boot_id="")


def _pools_of(move: VolumeMove, domain: DomainSpec | None) -> Sequence[PoolSpec]:
    named = (move.source_pool, move.target_pool, *(domain.pools if domain is not None else ()))
    return tuple({pool.pool_id: pool for pool in named}.values())
