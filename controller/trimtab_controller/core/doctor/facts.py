"""The fleet as the doctor looks at it: one frozen snapshot, from which every check concludes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property

from trimtab_controller.core.model import Host, HostClass, Network, Pool, PoolSpace
from trimtab_controller.core.model.failover import FailoverControl, FencePathRow

NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFacts:
    """What checks look at of a live vm."""

    id: str
    name: str
    project: str
    host_id: str
    ha: str
    arch: str
    machine: str
    cpu_model: str
    cpu_features: tuple[str, ...]
    desired_power: str
    observed_state: str
    problem: str
    attention: str

    @property
    def label(self) -> str:
        return f"{self.project}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateFacts:
    """The newest certificate of a host for one purpose (agent, libvirt)."""

    host_id: str
    purpose: str
    created_at: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachFacts:
    """How one host reaches one pool or network. `bridge`: the host's own, '' for the network's."""

    subject_id: str
    host_id: str
    state: str
    problem: str
    bridge: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFacts:
    """The snapshots that a vm keeps: the oldest, and how many."""

    vm_id: str
    name: str
    created_at: datetime
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UncoveredFacts:
    """A failure domain whose loss these vms would not survive, as the failover proof has it."""

    kind: str
    value: str
    vm_ids: tuple[str, ...]


# Not slotted: what several checks ask of it is worked out once.
@dataclass(frozen=True, kw_only=True)
class FleetFacts:
    now: datetime
    hosts: Sequence[Host] = ()
    classes: Mapping[str, HostClass] = field(default_factory=dict)
    vms: Sequence[VmFacts] = ()
    certificates: Sequence[CertificateFacts] = ()
    pools: Mapping[str, Pool] = field(default_factory=dict)
    spaces: Sequence[PoolSpace] = ()
    pool_reach: Sequence[ReachFacts] = ()
    networks: Sequence[Network] = ()
    network_reach: Sequence[ReachFacts] = ()
    control: FailoverControl = field(default_factory=lambda: FailoverControl(released={}, confirmed_off={}))
    fence_paths: Sequence[FencePathRow] = ()
    armed: frozenset[str] = frozenset()
    """Hosts whose warden is armed, as of their last granted renewal."""
    maintenance: Mapping[str, datetime] = field(default_factory=dict)
    """Hosts that operators hold out of service, since when."""
    skews_ms: Mapping[str, int] = field(default_factory=dict)
    """How far each host's clock is ahead of its gateway's; hosts that nobody heard from lately are left out."""
    snapshots: Sequence[SnapshotFacts] = ()
    uncovered: Sequence[UncoveredFacts] = ()

    @cached_property
    def host_by_id(self) -> Mapping[str, Host]:
        return {host.id: host for host in self.hosts}

    @cached_property
    def vm_by_id(self) -> Mapping[str, VmFacts]:
        return {vm.id: vm for vm in self.vms}

    @cached_property
    def protected(self) -> Mapping[str, tuple[VmFacts, ...]]:
        """Return by host the vms that are restarted elsewhere when it is lost."""
        found: dict[str, list[VmFacts]] = {}
        for vm in self.vms:
            if vm.ha == "restart" and vm.desired_power == "running" and vm.host_id:
                found.setdefault(vm.host_id, []).append(vm)
        return {host_id: tuple(vms) for host_id, vms in found.items()}


def some(names: Sequence[str]) -> str:
    """Return the first few names in order, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - NAMES_SHOWN
    return ", ".join(ordered[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
