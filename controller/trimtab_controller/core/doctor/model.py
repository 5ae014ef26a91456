"""What the doctor looks at, and what it says. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


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
    cpu_models: frozenset[str] = frozenset()
    """Named models that guests may have here; empty where the host has not told."""
    certificates: tuple[CertificateFacts, ...] = ()
    fences: tuple[FenceFacts, ...] = ()
    is_warden_armed: bool = False
    """Whether the end of its lease proves that its guests ended."""

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
    is_kept: bool = False
    """Restarted elsewhere when its host dies."""


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
class FleetFacts:
    """One snapshot, read in one transaction."""

    now: datetime
    hosts: tuple[HostFacts, ...] = ()
    pools: tuple[PoolFacts, ...] = ()
    vms: tuple[VmFacts, ...] = ()
    uncovered: tuple[UncoveredFacts, ...] = ()
    parked_operations: tuple[OperationFacts, ...] = ()
    """In `needs_attention`."""


Check = Callable[[FleetFacts], tuple[Finding, ...]]
