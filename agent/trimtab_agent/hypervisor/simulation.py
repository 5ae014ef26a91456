"""The world that simulated hosts share: storage, links between hosts, faults, time, and an oracle that saw every guest run.

Shared pools (by path) are one store for all hosts, local ones a store per host. The image lock is QEMU's: a volume is open for
writing in at most one guest, whatever the control plane believes. The oracle notes every start and stop of a guest process and
every instant at which one vm ran twice; nothing that is under test writes to it.

One lock for the whole world: verbs are dictionary work, and a thousand hosts in one process seldom meet.
"""

import hashlib
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab_agent.clock import Clock, SystemClock
from trimtab_protos.errors import DeadlineExceeded, TrimtabError, Unavailable
from trimtab_protos.messages import DomainSpec, ImageResult, ImageSpec, PoolSpec, VolumeSpec
from trimtab_protos.network_messages import PeerFinding

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

ANY_HOST = "*"
DEFAULT_POOL_BYTES = 1 << 40
CAPABILITIES = (
    "adopt",
    "apply-domain",
    "backup-hooks",
    "backup-raw",
    "cdrom",
    "console",
    "console-log",
    "copy-disks",
    "grow-volume",
    "host-devices",
    "image-iso",
    "image-qcow2",
    "image-raw",
    "layers",
    "migrate",
    "migrate-flat",
    "network-bridge",
    "network-isolated",
    "network-nat",
    "network-wire",
    "numa-tuning",
    "optional-cpu-features",
    "outer-networks",
    "pool-dir",
    "pool-iscsi",
    "pool-lvm_thin",
    "pool-nfs",
    "pool-rbd",
    "rbd-layers",
    "restore-raw",
    "seed-nocloud",
    "simulated",
    "tpm",
    "volume-linked-clone",
    "volume-luks",
    "volume-move",
)


class FaultKind(Enum):
    FAIL_BEFORE = auto()
    """The verb raises and did nothing."""
    FAIL_AFTER = auto()
    """The verb takes effect, then raises: a caller must observe."""
    HANG = auto()
    """The verb waits until `released` is set, then goes on."""


@dataclass(slots=True, eq=False)
class Fault:
    """One planned failure; used up by the first call it meets."""

    kind: FaultKind
    error: TrimtabError = field(default_factory=lambda: DeadlineExceeded("simulated-fault", "a planned fault"))
    met: threading.Event = field(default_factory=threading.Event)
    """Set when a call ran into it."""
    released: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class OracleEntry:
    at_s: float
    vm_id: str
    host_id: str
    epoch: int
    event: str
    """start or stop, of the guest's process."""


@dataclass(slots=True)
class StoredLayer:
    """One file of a volume; '' is the id of the bottom one."""

    below: tuple[str, str] | None = None
    """(volume id, layer id) that it lies over; None: nothing, or an image."""
    marks: set[str] = field(default_factory=set)
    """What guests wrote here: the content, as far as a simulation has one."""


@dataclass(slots=True)
class StoredVolume:
    spec: VolumeSpec
    allocated_bytes: int
    writer: tuple[str, str] | None = None
    """(host id, vm id) of the guest that has it open."""
    layers: dict[str, StoredLayer] = field(default_factory=lambda: {"": StoredLayer()})


@dataclass(frozen=True, slots=True)
class StoredImage:
    spec: ImageSpec
    result: ImageResult
    path: str


@dataclass(slots=True)
class PoolStore:
    """What one directory holds; shared by hosts or not."""

    capacity_bytes: int = DEFAULT_POOL_BYTES
    volumes: dict[str, StoredVolume] = field(default_factory=dict)
    images: dict[str, StoredImage] = field(default_factory=dict)
    markers: dict[str, str] = field(default_factory=dict)
    state_files: set[str] = field(default_factory=set)
    """Ids of vms whose seed and NVRAM lie here."""
    memories: dict[tuple[str, str], DomainSpec] = field(default_factory=dict)
    """(vm id, snapshot id) → the guest as it was saved."""
    is_hung: bool = False
    hung_on: set[str] = field(default_factory=set)
    """Hosts whose own way to it is cut; set by tests, under `SimulatedFleet.changed`."""
    promised_bytes: int = 0
    """What its volumes may still grow by. Kept with every change: a thousand hosts look at a shared pool with thousands of volumes."""
    written_bytes: int = 0
    """What they have allocated of their sizes."""
    foreign_bytes: int = 0
    """What somebody else has written here; set by tests."""
    _allocated_bytes: int = 0

    def hangs_on(self, host_id: str) -> bool:
        """Tell whether what this host does with it waits."""
        return self.is_hung or host_id in self.hung_on

    @property
    def used_bytes(self) -> int:
        return self.foreign_bytes + self._allocated_bytes + sum(image.result.file_size_bytes for image in self.images.values())

    def put_volume(self, volume: StoredVolume) -> None:
        """Store it in the place of what there was under its id."""
        self.drop_volume(volume.spec.volume_id)
        self.volumes[volume.spec.volume_id] = volume
        self._count(volume, 1)

    def allocate(self, volume: StoredVolume, more_bytes: int) -> None:
        """Let one of its volumes take more of the pool, or less."""
        self._count(volume, -1)
        volume.allocated_bytes += more_bytes
        self._count(volume, 1)

    def drop_volume(self, volume_id: str) -> None:
        volume = self.volumes.pop(volume_id, None)
        if volume is not None:
            self._count(volume, -1)

    def _count(self, volume: StoredVolume, sign: int) -> None:
        self._allocated_bytes += sign * volume.allocated_bytes
        self.promised_bytes += sign * max(0, volume.spec.size_bytes - volume.allocated_bytes)
        self.written_bytes += sign * min(volume.spec.size_bytes, volume.allocated_bytes)


class SimulatedFleet:
    """The shared world. Thread-safe; keeps no thread of its own and costs nothing while nobody calls."""

    def __init__(self, *, clock: Clock | None = None, latency_s: Mapping[str, float] | None = None) -> None:
        """`latency_s`: how long each verb takes, by its name; 0 where it is not named. A migration takes at least "migrate"."""
        self.clock = clock or SystemClock()
        self.latency_s = dict(latency_s or {})
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.hosts: dict[str, SimulatedHypervisor] = {}
        self.oracle: list[OracleEntry] = []
        self.double_runs: list[tuple[float, str, tuple[str, ...]]] = []
        """(when, vm id, hosts) of each start that made a second process of a vm."""
        self.stubborn_vms: set[str] = set()
        """Guests that ignore a request to shut down."""
        self.silent_agents: set[str] = set()
        """Vms whose guest agent says nothing."""
        self.shutdown_s = 0.0
        """How long a guest takes to shut down after it was asked."""
        self.disk_contents: dict[str, bytearray] = {}
        """What is in volumes that were backed up or restored, by id, wherever they lie."""
        self.peer_findings: dict[tuple[str, str], PeerFinding] = {}
        """What a host meets on its way to another, by their ids; nothing wrong where nothing is named."""
        self.own_folders: set[tuple[str, str]] = set()
        """(host, path) of each shared pool that is something else on that host: nothing was mounted there, for example."""
        self.observe_hang_s = 2.0
        """How long whoever observes a hung pool waits, of real time."""
        self.memory_rate_bytes_s = 0
        """Speed of a migration; 0: instantly."""
        self._faults: dict[tuple[str, str], deque[Fault]] = defaultdict(deque)
        self._stores: dict[str, PoolStore] = {}
        self._running: dict[str, set[str]] = defaultdict(set)
        self._cut: set[frozenset[str]] = set()
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def look(self, host_id: str, peer_id: str) -> PeerFinding:
        """Return what `host_id` meets on its way to the peer."""
        fine = PeerFinding(host_id=peer_id, mtu=1500, mtu_passed=1500, rate_bytes_s=1 << 30, has_clock=True)
        return self.peer_findings.get((host_id, peer_id), fine)

    # Faults and links.

    def plan_fault(self, verb: str, fault: Fault, *, host_id: str = ANY_HOST) -> Fault:
        """Let the next call of `verb` (on any host, or on one) meet `fault`; several are met in the order planned.

        Besides the verbs of `Hypervisor`: `migrate.copying` (both sides hold the guest) and `migrate.switched` (it runs on the
        target, the source has not said so).
        """
        with self.lock:
            self._faults[(host_id, verb)].append(fault)
        return fault

    def take_fault(self, host_id: str, verb: str) -> Fault | None:
        with self.lock:
            for place in ((host_id, verb), (ANY_HOST, verb)):
                waiting = self._faults.get(place)
                if waiting:
                    fault = waiting.popleft()
                    fault.met.set()
                    return fault
        return None

    def cut(self, first: str, second: str) -> None:
        """Break the migration link between two hosts."""
        with self.changed:
            self._cut.add(frozenset((first, second)))
            self.changed.notify_all()

    def heal(self, first: str, second: str) -> None:
        with self.changed:
            self._cut.discard(frozenset((first, second)))
            self.changed.notify_all()

    def require_link(self, source: str, target: str) -> "SimulatedHypervisor":
        """Return the target. Unavailable(`peer-down`) where it is down, unknown or cut off."""
        with self.lock:
            found = self.hosts.get(target)
            if found is None or not found.is_up() or frozenset((source, target)) in self._cut:
                raise Unavailable("peer-down", f"host {target} cannot be reached from {source}", source=source, target=target)
            return found

    # Storage.

    def store(self, host_id: str, pool: PoolSpec) -> PoolStore:
        """Return what lies below the pool's path as this host sees it."""
        is_shared = pool.is_shared and (host_id, pool.path) not in self.own_folders
        place = f"shared:{pool.path}" if is_shared else f"{host_id}:{pool.path}"
        with self.lock:
            return self._stores.setdefault(place, PoolStore())

    def keep_content(self, blocks: Iterable[bytes]) -> tuple[str, str, int]:
        """Store content once, however many images have it; return (path, SHA-256, size)."""
        with self.lock:
            if self._directory is None:
                self._directory = tempfile.TemporaryDirectory(prefix="trimtab-simulated-")
            directory = Path(self._directory.name)
        digest, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
                size += len(block)
        path = directory / digest.hexdigest()
        Path(file.name).replace(path)
        return str(path), digest.hexdigest(), size

    def close(self) -> None:
        """Remove stored content."""
        with self.lock:
            directory, self._directory = self._directory, None
        if directory is not None:
            directory.cleanup()

    # The oracle.

    def note_start(self, vm_id: str, host_id: str, epoch: int) -> None:
        with self.lock:
            hosts = self._running[vm_id]
            hosts.add(host_id)
            now_s = self.clock.boottime_s()
            self.oracle.append(OracleEntry(now_s, vm_id, host_id, epoch, "start"))
            if len(hosts) > 1:
                self.double_runs.append((now_s, vm_id, tuple(sorted(hosts))))

    def note_stop(self, vm_id: str, host_id: str, epoch: int) -> None:
        with self.lock:
            if host_id in self._running[vm_id]:
                self._running[vm_id].discard(host_id)
                self.oracle.append(OracleEntry(self.clock.boottime_s(), vm_id, host_id, epoch, "stop"))

    def running_hosts(self, vm_id: str) -> frozenset[str]:
        """Return every host on which a process of this guest is."""
        with self.lock:
            return frozenset(self._running.get(vm_id, ()))

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float) -> bool:
        """Block until `condition` holds; it is looked at after every change of a domain. For tests."""
        with self.changed:
            return self.changed.wait_for(condition, timeout_s)
