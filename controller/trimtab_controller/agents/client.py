"""The seam to the agents: what sagas and loops may ask of a host, in the dataclasses of `trimtab_protos.messages`.

Every mutating verb takes a `CommandKey`; the client adds what only it knows at the moment of sending: the incarnation and the
lease number of the host as last committed. Errors are the ten kinds; `Unavailable("peer-unreachable")` and `DeadlineExceeded`
leave the outcome unknown: send again under the same key, or observe.
"""

from collections.abc import Sequence
from typing import Protocol

from trimtab_controller.agents.adoption import AdoptionAgents
from trimtab_controller.agents.backups import BackupAgents
from trimtab_controller.agents.jobs import Job
from trimtab_controller.agents.packets import PacketAgents
from trimtab_controller.agents.proofs import ProofAgents
from trimtab_protos.beacon_slots import Intent
from trimtab_protos.messages import (
    ChangeLeft,
    CommandKey,
    DiskFormat,
    DomainObservation,
    DomainSpec,
    ImageSource,
    ImageSpec,
    Inventory,
    LayerMerge,
    LayerResult,
    MigrationOptions,
    MigrationSide,
    NetworkSpec,
    PoolObservation,
    PoolSpec,
    PowerAction,
    VolumeObservation,
    VolumeSpec,
)
from trimtab_protos.volume_messages import VolumeMove


class AgentClient(AdoptionAgents, BackupAgents, PacketAgents, ProofAgents, Protocol):
    """Thread-safe; every call has a deadline (10 s unless a verb's own work bounds it otherwise)."""

    def get_fitness(self, host_id: str) -> Inventory:
        """Return what tells whether a guest can run there, read this moment."""

    def list_domains(self, host_id: str) -> tuple[DomainObservation, ...]: ...

    def get_domain(self, host_id: str, vm_id: str) -> DomainObservation: ...

    def read_console(self, host_id: str, vm_id: str, offset: int, max_bytes: int) -> tuple[bytes, int]: ...

    def ensure_pool(self, host_id: str, key: CommandKey, pool: PoolSpec) -> PoolObservation: ...

    def check_marker(
        self, host_id: str, pool: PoolSpec, marker: str, *, write_content: str = "", remove: bool = False
    ) -> str: ...

    def remove_pool(self, host_id: str, key: CommandKey, pool_id: str) -> None: ...

    def ensure_volume(self, host_id: str, key: CommandKey, volume: VolumeSpec, pool: PoolSpec) -> VolumeObservation: ...

    def resize_volume(
        self, host_id: str, key: CommandKey, volume: VolumeSpec, pool: PoolSpec, vm_id: str
    ) -> VolumeObservation: ...

    def delete_volume(self, host_id: str, key: CommandKey, volume_id: str, format: DiskFormat, pool: PoolSpec) -> None: ...

    def ensure_network(self, host_id: str, key: CommandKey, network: NetworkSpec) -> tuple[bool, str]: ...

    def remove_network(self, host_id: str, key: CommandKey, network_id: str) -> None: ...

    def start_image_import(self, host_id: str, key: CommandKey, image: ImageSpec, pool: PoolSpec, source: ImageSource) -> Job: ...

    def offer_image(
        self,
        host_id: str,
        key: CommandKey,
        *,
        image_id: str,
        format: DiskFormat,
        pool: PoolSpec,
        ticket: str,
        ttl_s: int,
        peer_host_id: str,
    ) -> str: ...

    def delete_image(self, host_id: str, key: CommandKey, image_id: str, format: DiskFormat, pool: PoolSpec) -> None: ...

    def define_domain(
        self, host_id: str, key: CommandKey, domain: DomainSpec, *, needs_volumes: bool = False
    ) -> DomainObservation: ...

    def apply_domain(
        self, host_id: str, key: CommandKey, domain: DomainSpec
    ) -> tuple[DomainObservation, tuple[ChangeLeft, ...]]: ...

    def undefine_domain(
        self,
        host_id: str,
        key: CommandKey,
        vm_id: str,
        *,
        kill_if_running: bool,
        pools: Sequence[PoolSpec],
        keep_state_files: bool,
    ) -> None: ...

    def change_power(self, host_id: str, key: CommandKey, vm_id: str, action: PowerAction) -> DomainObservation: ...

    def prepare_migration(
        self, host_id: str, key: CommandKey, domain: DomainSpec, copied_volumes: Sequence[VolumeSpec], source_host_id: str
    ) -> tuple[str, str]: ...

    def start_migration(
        self,
        host_id: str,
        key: CommandKey,
        vm_id: str,
        *,
        libvirt_uri: str,
        migration_uri: str,
        copied_volume_ids: Sequence[str],
        options: MigrationOptions,
        next_epoch: int,
        target_domain: DomainSpec,
    ) -> Job: ...

    def settle_migration(
        self,
        host_id: str,
        key: CommandKey,
        vm_id: str,
        side: MigrationSide,
        domain: DomainSpec,
        removed_volumes: Sequence[VolumeSpec],
    ) -> DomainObservation: ...

    def switch_layers(self, host_id: str, key: CommandKey, domain: DomainSpec, *, wants_freeze: bool) -> LayerResult: ...

    def delete_layer(self, host_id: str, key: CommandKey, volume_id: str, layer_id: str, pool: PoolSpec) -> None: ...

    def delete_memory(self, host_id: str, key: CommandKey, vm_id: str, snapshot_id: str, pool: PoolSpec) -> None: ...

    def start_memory_snapshot(self, host_id: str, key: CommandKey, domain: DomainSpec, snapshot_id: str) -> Job: ...

    def start_memory_restore(self, host_id: str, key: CommandKey, domain: DomainSpec, snapshot_id: str) -> Job: ...

    def start_merge(self, host_id: str, key: CommandKey, merge: LayerMerge, pool: PoolSpec, domain: DomainSpec | None) -> Job: ...

    def start_volume_copy(self, host_id: str, key: CommandKey, volume: VolumeSpec, pool: PoolSpec) -> Job: ...

    def start_volume_move(self, host_id: str, key: CommandKey, move: VolumeMove, domain: DomainSpec | None) -> Job: ...

    def settle_volume_move(
        self, host_id: str, key: CommandKey, move: VolumeMove, domain: DomainSpec | None, *, is_recorded: bool
    ) -> bool: ...

    def read_slots(self, host_id: str, pool: PoolSpec, of_host_ids: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        """Return beat and intent, as blocks, of those hosts' beacons in the pool, read by `host_id`."""

    def write_intent(self, host_id: str, pool: PoolSpec, for_host_id: str, intent: Intent) -> bytes:
        """Have `host_id` forbid another host's leases; return the block as it stands afterwards, perhaps a newer leader's."""

    def reboot_host(self, host_id: str, key: CommandKey, boot_id: str, *, ends_guests: bool) -> bool:
        """Restart the machine unless it has another boot id by now; return whether that began. Conflict `guests-running`."""

    def get_job(self, host_id: str, key: CommandKey) -> Job: ...

    def cancel_job(self, host_id: str, key: CommandKey) -> Job: ...

    def leave_fleet(self, host_id: str, key: CommandKey) -> tuple[str, ...]: ...


__all__ = ["AgentClient", "Job"]
