"""Reads what matters out of a libvirt definition, ours or anybody's. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from trimtab_agent.hypervisor.kvm import resource_xml
from trimtab_agent.hypervisor.kvm.domain_xml import GUEST_AGENT_CHANNEL, METADATA_NAMESPACE
from trimtab_agent.hypervisor.kvm.identifiers import vm_id_of
from trimtab_agent.hypervisor.kvm.xml_tree import parse

_TO_KIB = {
    "b": 1 / 1024,
    "bytes": 1 / 1024,
    "KB": 1000 / 1024,
    "k": 1,
    "KiB": 1,
    "M": 1024,
    "MiB": 1024,
    "G": 1 << 20,
    "GiB": 1 << 20,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainFacts:
    """One definition. `vm_id` is empty for an unmanaged domain."""

    vm_id: str
    libvirt_name: str
    name: str
    """The vm's name; empty for an unmanaged one."""
    project: str
    uuid: str
    accelerator: str
    epoch: int
    turn: int
    boot_id: str
    """Host boot during which it was last started; "" once it was seen stopped."""
    vcpus: int
    memory_mib: int
    macs: tuple[str, ...]
    disk_paths: tuple[str, ...]
    networks: tuple[str, ...]
    """libvirt networks that its cards are on."""
    nvram_path: str
    restarts_elsewhere: bool
    """Its definition said that another host may start it when this one is lost."""
    adopted_disks: Mapping[str, str] | None
    """Volume ids by target, of a domain that keeps the definition it was adopted with; None for one that is defined as we do."""
    balloon_mib: int
    """What the balloon of a running guest leaves it, as libvirt was told; 0 for one without a floor."""
    squeezed_to_mib: int
    """What somebody's balloon leaves a guest that has no floor, and so should have everything; 0 where it has."""
    has_guest_agent: bool
    """The guest's agent has its end of the channel open; known of a running domain only."""


def read(xml: str) -> DomainFacts:
    """Return the facts of a definition as libvirt shows it."""
    root = parse(xml)
    libvirt_name = root.findtext("name") or ""
    vm = root.find(f"metadata/{{{METADATA_NAMESPACE}}}domain/{{{METADATA_NAMESPACE}}}vm")
    stamp = root.find(f"metadata/{{{METADATA_NAMESPACE}}}domain/{{{METADATA_NAMESPACE}}}stamp")
    loss = root.find(f"metadata/{{{METADATA_NAMESPACE}}}domain/{{{METADATA_NAMESPACE}}}loss")
    vm_id = vm.get("id", "") if vm is not None else ""
    # Name or UUID must agree: a clone that somebody made with `virt-clone` carries our metadata under others, and is not ours. An
    # adopted domain keeps its own name until its next stop, and its metadata says its UUID.
    adopted = root.find(f"metadata/{{{METADATA_NAMESPACE}}}domain/{{{METADATA_NAMESPACE}}}adopted")
    is_adopted = vm is not None and adopted is not None and adopted.get("uuid") == root.findtext("uuid")
    is_ours = vm is not None and (vm_id_of(libvirt_name) == vm_id or is_adopted)
    channel = root.find(f"devices/channel/target[@name='{GUEST_AGENT_CHANNEL}']")
    return DomainFacts(
        vm_id=vm_id if is_ours else "",
        libvirt_name=libvirt_name,
        name=vm.get("name", "") if vm is not None and is_ours else "",
        project=vm.get("project", "") if vm is not None and is_ours else "",
        uuid=root.findtext("uuid") or "",
        accelerator="kvm" if root.get("type") == "kvm" else "tcg",
        epoch=_integer(stamp, "epoch") if is_ours else 0,
        turn=_integer(stamp, "turn") if is_ours else 0,
        boot_id=stamp.get("boot", "") if stamp is not None and is_ours else "",
        vcpus=_vcpus(root),
        memory_mib=_memory_mib(root),
        macs=tuple(mac.get("address", "").lower() for mac in root.findall("devices/interface/mac")),
        disk_paths=tuple(_disk_paths(root)),
        networks=tuple(source.get("network", "") for source in root.findall("devices/interface[@type='network']/source")),
        nvram_path=root.findtext("os/nvram") or "",
        restarts_elsewhere=is_ours and loss is not None and loss.get("restarts") == "elsewhere",
        adopted_disks=_adopted_disks(adopted) if is_adopted else None,
        balloon_mib=_kib(root.find("currentMemory")) // 1024 if is_ours and resource_xml.read_floor(root) else 0,
        squeezed_to_mib=_squeezed_to_mib(root),
        has_guest_agent=channel is not None and channel.get("state") == "connected",
    )


def _adopted_disks(adopted: Element | None) -> dict[str, str]:
    disks = adopted.findall(f"{{{METADATA_NAMESPACE}}}disk") if adopted is not None else ()
    return {disk.get("target", ""): disk.get("volume", "") for disk in disks}


def _disk_paths(root: Element) -> list[str]:
    paths = []
    for source in root.findall("devices/disk/source"):
        path = source.get("file") or source.get("dev")
        if path:
            paths.append(path)
    return paths


def _vcpus(root: Element) -> int:
    vcpu = root.find("vcpu")
    if vcpu is None:
        return 0
    return int(vcpu.get("current") or vcpu.text or 0)


def _memory_mib(root: Element) -> int:
    """Return the memory the guest has: libvirt counts a virtio-mem device at its full size, the guest what it has plugged of it."""
    memory_kib = _kib(root.find("memory"))
    for target in root.findall("devices/memory[@model='virtio-mem']/target"):
        memory_kib += _kib(target.find("current")) - _kib(target.find("size"))
    return memory_kib // 1024


def _squeezed_to_mib(root: Element) -> int:
    current_mib = _kib(root.find("currentMemory")) // 1024
    # Of a stored definition libvirt tells nothing of what a virtio-mem device has plugged.
    is_told = all(target.find("current") is not None for target in root.findall("devices/memory/target"))
    is_squeezed = is_told and not resource_xml.read_floor(root) and 0 < current_mib < _memory_mib(root)
    return current_mib if is_squeezed else 0


def _kib(element: Element | None) -> int:
    return kib(float(element.text or 0), element.get("unit", "KiB")) if element is not None else 0


def kib(amount: float, unit: str) -> int:
    """Return an amount of memory as libvirt writes it, in KiB."""
    return int(amount * _TO_KIB.get(unit, 1))


def _integer(element: Element | None, name: str) -> int:
    text = element.get(name, "") if element is not None else ""
    return int(text) if text.isdigit() else 0
