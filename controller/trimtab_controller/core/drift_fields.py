"""Compares a vm as it shall be with the definitions of its domain, field by field: what somebody changed by hand. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab_protos.adoption_messages import DomainDescription
from trimtab_protos.messages import DomainSpec

OUR_CACHE = "none"
SQUEEZED = "balloon_mib"
"""What somebody's balloon leaves the guest of a vm that has none."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One field; '' is absent."""

    field: str
    desired: str
    live: str
    stored: str


def differences(
    desired: DomainSpec, live: DomainDescription, stored: DomainDescription, *, is_original_in_force: bool
) -> tuple[Difference, ...]:
    """Return where live or stored definition is not as desired, by field.

    Of a domain that keeps the definition it was adopted with only what Trimtab took over is compared: the rest is its own.
    """
    wanted = _of_spec(desired)
    seen, kept = _of_description(live, desired), _of_description(stored, desired)
    names = sorted({*wanted, *seen, *kept})
    found = (Difference(name, wanted.get(name, ""), seen.get(name, ""), kept.get(name, "")) for name in names)
    own = ("machine", "cpu_model", SQUEEZED) if is_original_in_force else ()
    return tuple(
        one for one in found if {one.live, one.stored} != {one.desired} and not _is_own(one.field, own, is_original_in_force)
    )


def _is_own(field: str, own: tuple[str, ...], is_original_in_force: bool) -> bool:
    return field in own or (
        is_original_in_force and field.endswith((".bus", ".model", ".boot_order", ".cache", "_limit", "_bytes_s"))
    )


def _of_spec(spec: DomainSpec) -> Mapping[str, str]:
    found = {
        "vcpus": str(spec.vcpus),
        "memory_mib": str(spec.memory_mib),
        "machine": spec.machine,
        "cpu_model": spec.cpu_model,
        "firmware": spec.firmware.value,
    }
    has_order = any(disk.boot_order for disk in spec.disks)
    first = min((disk.index for disk in spec.disks), default=0)
    for disk in spec.disks:
        order = disk.boot_order if has_order else int(disk.index == first)
        found |= _disk(disk.volume_id, bus=disk.bus.value, boot_order=order, cache=OUR_CACHE)
        found |= _limits(disk.volume_id, iops=disk.iops_limit, bytes_s=disk.bandwidth_limit_bytes_s)
    for nic in spec.nics:
        found |= {f"nic {nic.mac}": "attached", f"nic {nic.mac}.model": nic.model}
    return found


def _of_description(described: DomainDescription, desired: DomainSpec) -> Mapping[str, str]:
    found = {
        "vcpus": str(described.vcpus),
        "memory_mib": str(described.memory_mib),
        "machine": described.machine,
        "cpu_model": described.cpu_model or desired.cpu_model,
        "firmware": described.firmware.value,
    }
    if described.squeezed_to_mib:
        found[SQUEEZED] = str(described.squeezed_to_mib)
    for disk in described.disks:
        if disk.device != "disk" or disk.path.endswith("/seed.iso"):
            continue
        if disk.volume_id:
            found |= _disk(disk.volume_id, bus=disk.bus, boot_order=disk.boot_order, cache=disk.cache or OUR_CACHE)
            found |= _limits(disk.volume_id, iops=disk.iops_limit, bytes_s=disk.bandwidth_limit_bytes_s)
        else:
            found[f"disk {disk.target} ({disk.path})"] = "attached"
    for nic in described.nics:
        found |= {f"nic {nic.mac}": "attached", f"nic {nic.mac}.model": nic.model}
    return found


def _disk(volume_id: str, *, bus: str, boot_order: int, cache: str) -> Mapping[str, str]:
    name = f"disk {volume_id}"
    return {name: "attached", f"{name}.bus": bus, f"{name}.boot_order": str(boot_order), f"{name}.cache": cache}


def _limits(volume_id: str, *, iops: int, bytes_s: int) -> Mapping[str, str]:
    return {f"disk {volume_id}.iops_limit": str(iops), f"disk {volume_id}.bandwidth_limit_bytes_s": str(bytes_s)}
