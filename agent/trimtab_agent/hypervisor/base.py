"""The narrow seam between the agent and what runs guests: `kvm/` on real libvirt, `simulated.py` for scale and controlled time.

Every verb means *ensure*: called twice, or cut anywhere and called again, it ends the same. All verbs block; the servicer runs
them in bounded thread pools. One contract suite (`tests/contract/`) runs against both implementations.

Errors are the ten kinds of `trimtab_protos.errors`; besides those named below every verb may raise `Unavailable`
(`hypervisor-down`: libvirt does not answer, nothing was done) and `DeadlineExceeded` (outcome unknown).
The hypervisor knows nothing of operations, turns or leases: `servicer.py` and `replay.py` refuse before it is called.
Epoch and turn pass through it only to be kept in the domain's metadata, from which a lost journal is rebuilt.
"""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab_protos.adoption_messages import AdoptedDisk, Described
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.messages import (
    ChangeLeft,
    DomainObservation,
    DomainSpec,
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
    NetworkSpec,
    PoolObservation,
    PoolSpec,
    PowerAction,
    VolumeObservation,
    VolumeSpec,
)
from trimtab_protos.network_messages import Bridge, FirewallSpec
from trimtab_protos.volume_messages import VolumeMove


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the domain's metadata remembers of the last accepted command."""

    epoch: int
    turn: int


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply_domain` came to: the domain as it is, and what of the spec a running guest has not taken."""

    domain: DomainObservation
    left: tuple[ChangeLeft, ...] = ()


@dataclass(frozen=True, slots=True)
class DomainChange:
    """One lifecycle event, with what was observed after it."""

    kind: str
    domain: DomainObservation


def restarts_elsewhere(domain: DomainSpec) -> bool:
    """Tell whether another host may start this vm: it is kept, and every disk that it writes to is on shared storage."""
    shared = {pool.pool_id for pool in domain.pools if pool.is_shared}
    written = (disk for disk in domain.disks if not disk.is_read_only)
    return domain.is_kept and all(disk.pool_id in shared and (disk.move_pool_id or disk.pool_id) in shared for disk in written)


class JobControl(Protocol):
    """How a long verb reports and learns that it shall end."""

    @property
    def cancelled(self) -> threading.Event:
        """Set when a cancel was asked for; the verb ends soon, raising `Conflict(code="job-cancelled")` if it did not finish."""

    def report(self, progress: JobProgress) -> None:
        """Publish progress; cheap, any rate."""


class SourceReader(Protocol):
    """Reads an image source; the agent's composition root gives one that knows uploads, peers, URLs and import folders."""

    def read_blocks(
        self, source: ImageSource, pool: PoolSpec, control: JobControl, *, on_size: Callable[[int], None]
    ) -> Iterator[bytes]:
        """Yield the source in blocks of at most 1 MiB; ends early with an error of the ten kinds. The importer hashes,
        bounds and checks what it gets: a reader only transports.

        `on_size` is called before the first block where the source tells how many bytes there are; what it raises ends the read.
        """


class Hypervisor(Protocol):
    """One host's domains and their storage and networks."""

    def inventory(self, *, only_fitness: bool = False) -> Inventory:
        """Return what the host is now, but its pools, certificates and the digest. Takes up to a second.

        `only_fitness`: leave out what does not tell whether a guest can run here (devices, unmanaged domains): a move waits for it.
        """

    def load(self) -> HostLoad:
        """Return what the host does now; cheap, called at every heartbeat, never blocks on libvirt or storage."""

    def look_at_bridges(self, known: Sequence[Bridge]) -> tuple[Bridge, ...]:
        """Return these bridges of the inventory with the carrier that they have now; cheap and never blocks, as `load`."""

    def is_up(self) -> bool:
        """Tell whether the hypervisor answers; cheap and never blocks."""

    def subscribe(self, listener: Callable[[DomainChange], None]) -> None:
        """Call `listener` for every change from now on, from a thread of the hypervisor's own; it must not block."""

    def list_domains(self) -> tuple[DomainObservation, ...]:
        """Return every domain, unmanaged ones too (with an empty vm_id)."""

    def observe_domain(self, vm_id: str) -> DomainObservation:
        """Return one vm's domain; state ABSENT where there is none."""

    def read_console(self, vm_id: str, offset: int, max_bytes: int) -> tuple[bytes, int]:
        """Return bytes of the serial log and the next offset; negative offset: that many bytes before the end."""

    def open_console(self, vm_id: str, kind: ConsoleKind) -> socket.socket:
        """Return a stream socket, connected to the guest's console; it ends when the guest stops or moves away. The caller closes it.

        NotFound: no such domain. Conflict: it does not run (`wrong-domain-state`); it was started before it had one (`console-absent`)."""

    def open_wire(self, vm_id: str, nic_id: str) -> socket.socket:
        """Return a stream socket to a card on no network (kind WIRE): frames, four bytes of length before each. The caller closes it.

        NotFound: no such domain or card. Conflict: it does not run (`wrong-domain-state`). One at a time."""

    def ensure_pool(self, pool: PoolSpec) -> PoolObservation:
        """Make the pool usable. InvalidRequest: path missing, not absolute, or inside a folder the agent must not use."""

    def observe_pool(self, pool: PoolSpec, *, known: PoolObservation | None = None) -> PoolObservation:
        """Return space and health; a hung one is `is_responsive=False` within 2 s and stalls nothing else.

        `known`: what was seen a moment ago. Then a pool that answers may keep its figures that take a look at each volume, and one that
        is looked at by other programs all that is known of it.
        """

    def check_marker(self, pool: PoolSpec, marker: str, write_content: str, remove: bool) -> str:
        """Write, read ("" when absent) or remove a marker file that proves that a pool is shared."""

    def remove_pool(self, pool_id: str) -> None:
        """Forget the pool; files stay."""

    def ensure_volume(self, volume: VolumeSpec, pool: PoolSpec) -> VolumeObservation:
        """Create the volume, sparse. Conflict: another with this id and other properties; NotFound: its base image;
        NoCapacity: the pool is full (nothing stays behind)."""

    def observe_volume(self, volume_id: str, pool: PoolSpec) -> VolumeObservation:
        """Return whether the volume is there and its sizes."""

    def resize_volume(self, volume: VolumeSpec, pool: PoolSpec, vm_id: str) -> VolumeObservation:
        """Grow the volume to the spec's size, under the running guest of `vm_id` where this host runs it.
        InvalidRequest: it would shrink (`volume-shrink`); NotFound; Conflict: another guest has it open (`image-locked`)."""

    def delete_volume(self, volume_id: str, pool: PoolSpec) -> None:
        """Remove the volume. Conflict: a domain of this host uses it."""

    def give_volume_keys(self, keys: Mapping[str, str]) -> None:
        """Keep these keys of encrypted volumes (64 hexadecimal digits each) and secrets of pools, by id, in memory for a while.

        Verbs that need one that is not there raise Unavailable (`volume-key-missing`) and have done nothing."""

    def require_volume_keys(self, volume_ids: Sequence[str]) -> None:
        """Raise that where one of them is missing."""

    def import_image(self, image: ImageSpec, pool: PoolSpec, source: ImageSource, control: JobControl) -> ImageResult:
        """Bring the image into the pool, checked as S1-S6 of the security list; nothing half-made stays behind.
        InvalidRequest: the content is refused (code says why); NoCapacity: no room."""

    def open_image(self, image_id: str, pool: PoolSpec) -> str:
        """Return the path of a replica for reading. NotFound."""

    def delete_image(self, image_id: str, pool: PoolSpec) -> None:
        """Remove the replica. Conflict: a volume in this pool is a linked clone of it."""

    def ensure_network(self, network: NetworkSpec) -> None:
        """Make the network usable for guests here. Conflict: the bridge is missing or its MTU is smaller; never changes a
        bridge that is not ours."""

    def remove_network(self, network_id: str) -> None:
        """Remove what `ensure_network` made."""

    def set_firewall(self, vm_id: str, firewall: FirewallSpec) -> int:
        """Change what may reach the vm, live; return the generation in force, 0 where the vm is not here. A lower one changes nothing."""

    def define_domain(self, domain: DomainSpec, stamp: Stamp, *, needs_volumes: bool = False) -> DomainObservation:
        """Make domain, seed and NVRAM exist and equal the spec; a running domain keeps running.

        `needs_volumes`: NotFound, and nothing is defined, where a disk's volume is not there."""

    def apply_domain(self, domain: DomainSpec, stamp: Stamp) -> Applied:
        """Define the domain as the spec says and, where it runs, plug and unplug disks, cards, memory and vcpus until it is so.

        Takes up to 15 s: a guest is asked and observed, and may be asked again by a repeat. Memory is settled before a vcpu is
        unplugged. NotFound: a volume to plug in; Conflict: no free slot for a device (`no-free-slot`)."""

    def undefine_domain(self, vm_id: str, pools: Sequence[PoolSpec], *, kill_if_running: bool, keep_state_files: bool) -> None:
        """Remove the domain and all that belongs to it but volumes. Conflict: it runs and may not be killed."""

    def change_power(self, vm_id: str, action: PowerAction, stamp: Stamp) -> DomainObservation:
        """Do it, ensure-wise: starting a running domain is fine. NotFound: no such domain. Conflict: e.g. resume of a
        stopped one, start of one whose image is locked elsewhere (`image-locked`)."""

    def describe_domain(self, domain: str, vm_id: str) -> Described:
        """Return what a domain is: one of anybody's by name or UUID, or the vm's. NotFound where there is none."""

    def adopt_domain(self, uuid: str, domain: DomainSpec, disks: Sequence[AdoptedDisk], stamp: Stamp) -> DomainObservation:
        """Make the domain with this UUID the vm's; its guest notices nothing. Its disks' files get the names of volumes beside their
        own. NotFound: no such domain; Conflict: it is another vm's, or a disk is not what it was when it was described."""

    def release_domain(self, domain: DomainSpec, *, has_autostart: bool) -> DomainObservation:
        """Make the vm's domain a plain one, which goes on as it is; state ABSENT where the vm has none."""

    def prepare_migration(self, domain: DomainSpec, copied_volumes: Sequence[VolumeSpec], source_host_id: str) -> tuple[str, str]:
        """Ready this host as target; return (libvirt URI, migration URI). Conflict names what would be refused."""

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
        """Move the domain live and block until the hypervisor says it ended. Whatever it says, the caller observes both hosts.
        Called again while one is under way (agent restarted): attaches to it."""

    def settle_migration(
        self, vm_id: str, side: MigrationSide, domain: DomainSpec, removed_volumes: Sequence[VolumeSpec], stamp: Stamp
    ) -> DomainObservation:
        """KEEP: persist the domain with the stamp. REMOVE: undefine leftovers and delete the copied volumes listed.
        Conflict: REMOVE where the domain still runs, KEEP where it is absent."""

    # Layers: what snapshots and clones are made of. A volume is a stack of files; a guest writes to one and reads through the rest.

    def switch_layers(self, domain: DomainSpec, stamp: Stamp, *, wants_freeze: bool) -> LayerResult:
        """Let the domain write to the layers of the spec (all disks at one instant where it runs), and define it so.

        Conflict (`layer-unexpected`): the guest writes to a layer that the new one is not laid over."""

    def snapshot_memory(self, domain: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl) -> LayerResult:
        """Save the running guest's memory and switch layers at the same instant; the guest runs on meanwhile.

        NoCapacity: no room for the memory; the guest runs on in its old layers. Conflict: it does not run."""

    def restore_memory(self, domain: DomainSpec, stamp: Stamp, snapshot_id: str, control: JobControl) -> LayerResult:
        """Start the stopped domain from a saved memory. NotFound: no such memory; Conflict: its hardware has changed since."""

    def merge_layer(
        self, merge: LayerMerge, pool: PoolSpec, domain: DomainSpec | None, stamp: Stamp, control: JobControl
    ) -> LayerResult:
        """Merge a layer into the one below, under the running guest of this host too, and remove its file.

        At every instant either the upper layer's file is there and complete, or the lower one is. NoCapacity: the pool is full, and
        nothing has changed for the guest."""

    def copy_volume(self, volume: VolumeSpec, pool: PoolSpec, control: JobControl) -> LayerResult:
        """Make an independent volume of a layer seen through all below it; nothing half-made stays behind."""

    def delete_layer(self, volume_id: str, layer_id: str, pool: PoolSpec) -> None:
        """Remove a layer. Conflict (`layer-in-use`): another lies over it, or a domain of this host uses it."""

    def delete_memory(self, vm_id: str, snapshot_id: str, pool: PoolSpec) -> None:
        """Remove the saved memory of a snapshot."""

    # Volumes that go to another pool of this host.

    def move_volume(self, move: VolumeMove, domain: DomainSpec | None, stamp: Stamp, control: JobControl) -> LayerResult:
        """Bring the volume, seen through all that it lies over, into the target pool.

        Under a guest of this host that runs the source is gone when this returns, and the guest writes to the target. Else both are
        there and equal; the source goes with `settle_move`. At every instant the volume is whole on one side: in the source as long
        as it is there. NoCapacity: the target is full; Conflict (`image-locked`): another guest has the volume open."""

    def settle_move(self, move: VolumeMove, domain: DomainSpec | None, stamp: Stamp, *, is_recorded: bool) -> bool:
        """End what is under way of a move and remove the side that is not the volume; tell whether the target is.

        `is_recorded`: it is, by the controller's record, which `domain` follows. Conflict (`volume-half-moved`): the source is not
        there and the target not whole, so that nothing is removed."""
