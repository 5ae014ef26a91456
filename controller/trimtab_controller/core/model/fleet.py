"""Hosts and their classes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_protos.messages import Inventory


@dataclass(frozen=True, slots=True, kw_only=True)
class HostClass:
    id: str
    name: str
    cpu_model: str | None
    machine: str | None
    vcpu_ratio_permille: int
    memory_ratio_permille: int
    memory_reserve_mib: int
    policy: str
    # any, or one-host-loss: only what could be restarted after the loss of one host.
    admission: str = "any"
    # What classes of cpu time mean on its hosts; see `core/guest_resources.py`.
    cpu_classes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    version: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    id: str
    name: str
    host_class_id: str
    labels: Mapping[str, str]
    is_cordoned: bool
    agent_address: str
    migration_address: str
    machine_id: str
    smbios_uuid: str
    connectivity: HostConnectivity
    connectivity_at: datetime
    boot_id: str
    incarnation: str
    lease_number: int
    inventory: Inventory | None
    inventory_at: datetime | None
    generation: int
    vcpus_limit: int
    memory_limit_mib: int
    vcpus_claimed: int
    memory_claimed_mib: int
    unmanaged_vcpus: int
    unmanaged_memory_mib: int
    version: int
    created_at: datetime
    # [{key, value, effect}]; what keeps vms off.
    taints: tuple[Mapping[str, str], ...] = ()
    # The one project whose vms may run here.
    exclusive_project_id: str = ""
    # As the operator wrote them: `4-15,20-31`.
    dedicated_cpus: str = ""
