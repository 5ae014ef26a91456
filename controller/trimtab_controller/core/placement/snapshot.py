"""What the scheduler is told about hosts, pools and groups: frozen values, read once per batch. `fleet.py` makes columns of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.pool_space import claim_limit_bytes


class TaintEffect(StrEnum):
    # Vms that do not tolerate it are not placed there.
    REFUSE = "refuse"
    # They are placed there only where nothing else is as good.
    AVOID = "avoid"


@dataclass(frozen=True, slots=True, order=True)
class Taint:
    """A mark of an operator's on a host that keeps vms off which do not tolerate it."""

    key: str
    value: str = ""
    effect: TaintEffect = TaintEffect.REFUSE

    def __str__(self) -> str:
        return f"{self.key}={self.value}:{self.effect.value}" if self.value else f"{self.key}:{self.effect.value}"


@dataclass(frozen=True, slots=True)
class Stock:
    """A countable thing on one host: devices of a kind, licences, whatever an operator counts."""

    limit: int
    claimed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSnapshot:
    """One NUMA cell of a host, with what is given to single vms there."""

    cell: int
    cpus_limit: int = 0
    """Cpus set aside for pinning; they are not part of the host's `vcpus_limit`."""
    cpus_claimed: int = 0
    pages: Mapping[int, Stock] = field(default_factory=dict)
    """Huge pages by size in KiB; their memory is not part of the host's `memory_limit_mib`."""

    def emptied(self) -> "CellSnapshot":
        """Return the cell as if nothing of it were claimed."""
        pages = {size: Stock(stock.limit, 0) for size, stock in self.pages.items()}
        return replace(self, cpus_claimed=0, pages=pages)


@dataclass(frozen=True, slots=True)
class NetworkReach:
    """How one host reaches one network."""

    is_ready: bool
    mtu: int = 0
    """0: not known; then it does not refuse."""
    lost_bridge: str = ""
    """Its bridge, where that has lost its carrier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSnapshot:
    """One host. Free = limit - claimed - unmanaged; limits have overcommit and reserve applied already."""

    host_id: str
    name: str
    vcpus_limit: int
    memory_limit_mib: int
    vcpus_claimed: int = 0
    memory_claimed_mib: int = 0
    unmanaged_vcpus: int = 0
    unmanaged_memory_mib: int = 0
    memory_reserve_mib: int = 0
    """Kept for the host itself, and not part of the limit; only told in reasons."""
    labels: Mapping[str, str] = field(default_factory=dict)
    host_class: str = ""
    class_cpu_model: str = ""
    """What a vm gets here that names no CPU model; '' while the class has none."""
    class_machine: str = ""
    is_cordoned: bool = False
    connectivity: HostConnectivity = HostConnectivity.UP
    arch: str = ""
    accelerator: str = ""
    usable_cpu_models: frozenset[str] = frozenset()
    cpu_features: frozenset[str] = frozenset()
    machines: frozenset[str] = frozenset()
    qemu_series: tuple[int, ...] = ()
    """Major and minor of the QEMU that it gives to guests; () where that is not known."""
    has_uefi: bool = False
    capabilities: frozenset[str] = frozenset()
    pools: Mapping[str, bool] = field(default_factory=dict)
    """Pools set up on this host, and whether they are ready."""
    networks: Mapping[str, NetworkReach] = field(default_factory=dict)
    image_ids: frozenset[str] = frozenset()
    """Images with a replica on a local pool here."""
    taints: frozenset[Taint] = frozenset()
    exclusive_project_id: str = ""
    """The one project whose vms may run here; '' for any."""
    cells: tuple[CellSnapshot, ...] = ()
    devices: Mapping[str, Stock] = field(default_factory=dict)
    """PCI devices that a vm can be given, by kind, for example `gpu-a100`."""
    resources: Mapping[str, Stock] = field(default_factory=dict)
    """What operators count, by a name of theirs."""
    can_be_proven_off: bool = True
    """Its warden is armed or a power device of it answers: if it is lost, its vms restart elsewhere without an operator."""
    generation: int = 0
    """Of the claims, when they were read."""

    @property
    def runs_class_cpu_model(self) -> bool:
        return not self.class_cpu_model or self.class_cpu_model in self.usable_cpu_models

    @property
    def runs_class_machine(self) -> bool:
        return not self.class_machine or self.class_machine in self.machines

    @property
    def is_scarce(self) -> bool:
        """Whether it has what few hosts have: vms that need none of it are better placed elsewhere."""
        return any(stock.limit for stock in self.devices.values()) or any(cell.cpus_limit for cell in self.cells)


@dataclass(frozen=True, slots=True)
class PoolPlace:
    """Space at one place: a whole shared pool, or a local pool on one host."""

    capacity_bytes: int
    available_bytes: int
    claimed_bytes: int
    written_bytes: int | None = None
    """What its volumes have allocated of their sizes; None where its hosts cannot tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSnapshot:
    pool_id: str
    name: str
    is_shared: bool
    is_sharing_proven: bool = True
    """False until each host has read what another wrote; no new volumes before that."""
    reserve_permille: int = 0
    places: Mapping[str, PoolPlace] = field(default_factory=dict)
    """By host id; '' for a shared pool."""

    def claim_limit_bytes(self, host_id: str = "") -> int:
        """Return the most that may be claimed at a place in all: the bound of the conditional UPDATE that takes the space.

        See `core.pool_space`.
        """
        place = self.places.get("" if self.is_shared else host_id)
        if place is None:
            return 0
        return claim_limit_bytes(
            capacity_bytes=place.capacity_bytes,
            available_bytes=place.available_bytes,
            claimed_bytes=place.claimed_bytes,
            written_bytes=place.written_bytes,
            reserve_permille=self.reserve_permille,
        )

    def free_bytes(self, host_id: str = "") -> int:
        place = self.places.get("" if self.is_shared else host_id)
        return 0 if place is None else self.claim_limit_bytes(host_id) - place.claimed_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSnapshot:
    """Where the members of a vm group are. Its rules come with each request of a member (`request.GroupNeed`)."""

    group_id: str
    members: Mapping[str, str] = field(default_factory=dict)
    """Host id by vm id; of a vm that migrates the target's."""
    generation: int = 0
    """Of the memberships in force, when they were read."""
