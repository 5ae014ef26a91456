"""What a manifest says of a vm, so that a repository and its key alone can bring it back: settings as JSON, names instead of ids.

The seed is among them and may hold secrets: it lies in the manifest, which is sealed, and in rows that only the vm's operators read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from trimtab_controller.core.model import RecoveryPlan, Volume
from trimtab_controller.store import describe, recovery_plans, secgroups
from trimtab_protos.messages import DiskBus

FORMAT = 1
PLANS = "recovery_plans"
_VM_FIELDS = (
    "name",
    "labels",
    "arch",
    "machine",
    "cpu_model",
    "cpu_features",
    "vcpus",
    "vcpus_max",
    "memory_mib",
    "memory_max_mib",
    "firmware",
    "has_secure_boot",
    "has_tpm",
    "os",
    "os_family",
    "host_selector",
    "host_class",
    "ha",
    "priority",
    "start_delay_s",
    "start_group",
    "start_order",
    "drain_policy",
    "wishes",
)


def disk_name(volume: Volume) -> str:
    """Return the disk's name in its domain: vda."""
    return ("vd" if volume.bus is DiskBus.VIRTIO else "sd") + chr(ord("a") + (volume.disk_index or 0))


def of_vm(parts: describe.VmParts, groups: Sequence[str]) -> Mapping[str, Any]:
    """Return the settings of the vm and of what belongs to it; `groups` are the names of its security groups."""
    vm: dict[str, Any] = {name: getattr(parts.vm, name) for name in _VM_FIELDS}
    vm |= {"labels": dict(vm["labels"]), "cpu_features": list(vm["cpu_features"]), "firmware": str(vm["firmware"])}
    vm |= {"host_selector": dict(vm["host_selector"]), "wishes": dict(vm["wishes"])}
    return {
        "format": FORMAT,
        "project": parts.project_name,
        "vm": vm,
        "seed": dict(parts.vm.seed),
        "volumes": [
            {
                "id": volume.id,
                "name": volume.name,
                "disk": disk_name(volume),
                "size_bytes": volume.size_bytes,
                "pool": parts.pools[volume.pool_id].name,
                "bus": volume.bus.value,
                "disk_index": volume.disk_index or 0,
                "boot_order": volume.boot_order,
                "iops_limit": volume.iops_limit,
                "bandwidth_limit_mib_s": volume.bandwidth_limit_mib_s,
            }
            for volume in parts.volumes
            if not volume.is_read_only
        ],
        "nics": [
            {
                "network": parts.networks[nic.network_id].name,
                "mac": nic.mac,
                "model": nic.model,
                "addresses": list(nic.addresses),
            }
            for nic in parts.nics
        ],
        "secgroups": list(groups),
    }


def read(session: Session, vm_id: str, *, repo_id: str) -> Mapping[str, Any]:
    """Return the settings as a backup in this repository says them: with the recovery plans that name the vm, so that they are found
    again where the database is gone."""
    parts = describe.read_vm(session, vm_id)
    found = of_vm(parts, secgroups.names_of(session, [vm_id]).get(vm_id, ()))
    plans = recovery_plans.naming(session, parts.vm.project_id, parts.vm.name, repo_id=repo_id)
    return {**found, PLANS: [_plan(one) for one in plans]} if plans else found


def _plan(plan: RecoveryPlan) -> Mapping[str, Any]:
    return {
        "name": plan.name,
        "groups": list(plan.groups),
        "networks": dict(plan.networks),
        "pools": dict(plan.pools),
        "cpu_model": plan.cpu_model,
    }
