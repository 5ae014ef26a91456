"""What the doctor looks at, and what it says. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from trimtab_controller.core.host_troubles import Trouble


class Severity(StrEnum):
    """How soon it hurts, worst first."""

    CRITICAL = "critical"  # something is down, or will be at the next fault
    WARNING = "warning"  # it will hurt if nobody does anything
    NOTICE = "notice"  # it costs something, or narrows what can be done


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that hurts or will, with the command that cures it or shows more."""

    severity: Severity
    kind: str
    """Stable, kebab-case; the metric's label."""
    subject: str
    """Kind and name, as `host node1`."""
    message: str
    cure: str
    since: datetime | None = None
    """None where nobody wrote it down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFacts:
    purpose: str
    not_after: datetime
    """Of the newest one that is not revoked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceFacts:
    name: str
    tested_at: datetime | None
    test_power: str
    """What the device answered to the last test; "" where it did not."""
    test_message: str

    @property
    def is_ready(self) -> bool:
        """It answered the last test, and nothing contradicted it."""
        return self.tested_at is not None and self.test_power in {"on", "off"} and not self.test_message


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    id: str
    name: str
    connectivity: str
    connectivity_at: datetime
    is_cordoned: bool
    is_in_maintenance: bool
    memory_limit_mib: int
    memory_claimed_mib: int
    unmanaged_memory_mib: int
    qemu_version: str = ""
    qemu_build: str = ""
    """What the installed QEMU says of itself, with its package; '' where the host has not told."""
    guest_qemus: tuple[tuple[str, str], ...] = ()
    """Names of vms whose guests run another one here, with what that says of itself."""
    cpu_models: frozenset[str] = frozenset()
    """Named models that guests may have here; empty where the host has not told."""
    certificates: tuple[CertificateFacts, ...] = ()
    fences: tuple[FenceFacts, ...] = ()
    cpu_features: frozenset[str] = frozenset()
    machines: frozenset[str] = frozenset()
    """Machine types of its QEMU; empty where the host has not told."""
    memory_reserve_mib: int | None = None
    """What its class keeps for the host itself; None where it is not known."""
    is_warden_armed: bool = False
    """Whether the end of its lease proves that its guests ended."""
    skew_ms: int = 0
    """How far its clock is ahead of its gateway's."""
    troubles: tuple[Trouble, ...] = ()
    """What is wrong with it while it is heard from."""

    @property
    def can_take_guests(self) -> bool:
        return self.connectivity == "up" and not self.is_cordoned


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    name: str
    host: str
    """"" for a shared pool."""
    capacity_bytes: int
    available_bytes: int
    reserve_permille: int
    problem: str
    """Why it is not usable there; "" where it is."""
    is_unresponsive: bool = False
    """Its storage does not answer: whoever works on it hangs."""
    vms: tuple[str, ...] = ()
    """Of one that is not usable on a host: the vms there that have disks in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFacts:
    project: str
    name: str
    host_id: str
    cpu_model: str
    desired_power: str
    observed_state: str
    problem: str
    is_busy: bool
    """An operation on it has not ended: it is on its way and nothing is said of it."""
    is_adjusted_at_next_stop: bool
    machine: str = ""
    cpu_features: tuple[str, ...] = ()
    is_kept: bool = False
    """Restarted elsewhere when its host is lost."""
    hand_changes: tuple[str, ...] = ()
    """Fields of its domain that somebody changed by hand."""
    given_up_by: str = ""
    """`failover` where that found no way to restart it."""
    guest_agent: str = ""
    """What is known of its guest's agent, `core/guest_agents.py`."""
    guest_agent_since: datetime | None = None
    os_family: str = "linux"

    @property
    def label(self) -> str:
        return f"{self.project}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UncoveredFacts:
    """A vm that the loss of a failure domain would end."""

    vm: str
    domain: str
    """Kind and name, as `host node1`."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationFacts:
    id: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    name: str
    mtu: int
    bridge: str
    mtus: Mapping[str, int] = field(default_factory=dict)
    """Of the bridge that it has on each host, by the host's name; hosts whose bridge is not known are left out."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Why a host does not reach it, by the host's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFacts:
    """A router with an outer side, and the hosts that reach its outer network, by name."""

    project: str
    name: str
    outer: str
    up: tuple[str, ...] = ()
    down: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFacts:
    """The snapshots that a vm keeps: the oldest, and how many."""

    project: str
    vm: str
    name: str
    created_at: datetime
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupFacts:
    """A vm that is not protected as its policy says."""

    project: str
    vm: str
    policy: str
    problem: str
    is_lost: bool
    """There is nothing that it could be restored from."""
    since: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFacts:
    """One snapshot, read in one transaction."""

    now: datetime
    hosts: tuple[HostFacts, ...] = ()
    pools: tuple[PoolFacts, ...] = ()
    vms: tuple[VmFacts, ...] = ()
    uncovered: tuple[UncoveredFacts, ...] = ()
    parked_operations: tuple[OperationFacts, ...] = ()
    """In `needs_attention`."""
    networks: tuple[NetworkFacts, ...] = ()
    routers: tuple[RouterFacts, ...] = ()
    overlay_problem: str = ""
    """Why OVN's database takes no changes; "" where it does, or is not used."""
    overlay_since: datetime | None = None
    snapshots: tuple[SnapshotFacts, ...] = ()
    overdue_backups: tuple[BackupFacts, ...] = ()
    is_failover_paused: bool = False
    failover_frozen: str = ""
    """Why failover stands still by itself; "" where it does not."""
    database_behind: str = ""
    """Why the database is held for older than the fleet; "" where it is not."""
    database_behind_since: datetime | None = None


Check = Callable[[FleetFacts], tuple[Finding, ...]]

NAMES_SHOWN = 5


def some(names: Sequence[str]) -> str:
    """Return the first few names in order, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - NAMES_SHOWN
    return ", ".join(ordered[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
