"""Vms, their nics and their claims."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_protos.messages import Firmware


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm:
    id: str
    uuid: str
    project_id: str
    name: str
    labels: Mapping[str, str]
    origin: str
    arch: str
    machine: str
    cpu_model: str
    cpu_features: tuple[str, ...]
    vcpus: int
    vcpus_max: int
    memory_mib: int
    memory_max_mib: int
    next_vcpus: int = 0
    next_memory_mib: int = 0
    firmware: Firmware
    has_secure_boot: bool
    has_tpm: bool = False
    os: str = ""
    os_family: str = "linux"
    has_cdrom: bool = False
    cdrom_image_id: str = ""
    drivers_image_id: str = ""
    # Least memory that the balloon leaves it; 0: it has none.
    balloon_min_mib: int = 0
    # '' for none; see `core/guest_resources.py`.
    cpu_class: str = ""
    image_id: str | None
    seed: Mapping[str, Any]
    host_selector: Mapping[str, str]
    host_class: str
    ha: str
    priority: int
    start_delay_s: int = 0
    # A name within its project, '' for none; lower orders start first after a loss.
    start_group: str = ""
    start_order: int = 0
    # What a drain may do with it: migrate, restart, wait.
    drain_policy: str = "migrate"
    desired_power: DesiredPower
    host_id: str
    epoch: int
    observed_state: ObservedState
    observed_reason: str
    observed_host_id: str
    observed_at: datetime | None
    observed_addresses: tuple[str, ...]
    observed_balloon_mib: int = 0
    problem: str
    # Who says that only an operator may go on with it: `failover` gave it up, `stray` runs twice; '' : nobody.
    attention: str = ""
    # Fields of its domain that somebody changed by hand.
    hand_changes: tuple[str, ...] = ()
    version: int
    created_at: datetime
    deleted_at: datetime | None
    purge_after: datetime | None
    # The snapshot that what it writes now began from; '' for none.
    current_snapshot_id: str = ""
    template_id: str | None = None
    # What few vms ask for; see `operations/placement_snapshot.py`.
    wishes: Mapping[str, Any] = field(default_factory=dict)
    # '' for none; the policy's schedule counts from when it asked last.
    backup_policy_id: str = ""
    backup_asked_at: datetime | None = None


class VmSummary(NamedTuple):
    """What a list of many vms shows of each: fields of `Vm`, powers and states as their words, documents as their JSON.

    A plain tuple, since a page holds a thousand of them and each costs an eighth of what a dataclass does. What changes with every
    heartbeat stands last: the rest before it stays the same for as long as nobody changes the vm.
    """

    id: str
    name: str
    labels: str
    arch: str
    vcpus: int
    memory_mib: int
    image_id: str | None
    desired_power: str
    host_id: str
    epoch: int
    observed_state: str
    observed_addresses: str
    problem: str
    hand_changes: str
    created_at: datetime
    deleted_at: datetime | None
    observed_host_id: str
    observed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmGroup:
    """Vms with a placement relation; `rule` is `{"rules": [...]}`, each as `core.placement.needs.GroupRule` stores it."""

    id: str
    project_id: str
    name: str
    rule: Mapping[str, Any]
    generation: int
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    id: str
    vm_id: str
    network_id: str
    nic_index: int
    mac: str
    model: str
    # With prefix length: `10.0.0.5/24`.
    addresses: tuple[str, ...]
    # It may send as others, as a router does.
    allows_spoofing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    id: str
    project_id: str
    # Overlay networks of its project that name it are behind it.
    name: str
    # Both None: it has no outer side.
    outer_network_id: str | None
    outer_address: str | None
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatingAddress:
    id: str
    project_id: str
    # The outer network that it is an address of.
    network_id: str
    # The address.
    name: str
    # Whom it leads to; None: nobody.
    nic_id: str | None
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SecGroup:
    """What may reach the vms that are in it; rules as `core.firewall` writes them."""

    id: str
    project_id: str
    name: str
    rules: tuple[str, ...]
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one vm holds on one host; two of them while a migration is not settled."""

    vm_id: str
    host_id: str
    role: str
    epoch: int
    vcpus: int
    memory_mib: int
    operation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationRow:
    """While it exists both hosts are holders."""

    vm_id: str
    operation_id: str
    source_host_id: str
    target_host_id: str
    source_epoch: int
    target_epoch: int
    copied_volume_ids: tuple[str, ...]
