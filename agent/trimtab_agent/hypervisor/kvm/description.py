"""Says in typed fields what anybody's libvirt definition is, and what of it no field says. Pure: files are looked at elsewhere.

Whatever is not known here is listed as kept: better a line too many than a device that vanishes at the next stop unannounced.
"""

from collections import Counter
from collections.abc import Mapping
from xml.etree.ElementTree import Element

from trimtab_agent.hypervisor.kvm import cpu_features, domain_facts
from trimtab_agent.hypervisor.kvm.domain_xml import LOADERS
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.adoption_messages import DescribedDisk, DescribedNic, DomainDescription
from trimtab_protos.messages import DomainState, Firmware

ORIGINAL_MAX_BYTES = 256 << 10
_EXPRESSED = frozenset(
    {
        "name",
        "uuid",
        "metadata",
        "memory",
        "currentMemory",
        "maxMemory",
        "vcpu",
        "vcpus",
        "os",
        "features",
        "cpu",
        "clock",
        "on_poweroff",
        "on_reboot",
        "on_crash",
        "on_lockfailure",
        "devices",
        "pm",
        "resource",
        "seclabel",
        "genid",
        "title",
        "description",
    }
)
"""Elements that a field says, or whose loss no guest notices."""
_EXPRESSED_DEVICES = frozenset(
    {
        "emulator",
        "disk",
        "interface",
        "controller",
        "serial",
        "console",
        "memballoon",
        "rng",
        "video",
        "audio",
        "input",
        "tpm",
        "hostdev",
    }
)
_GUEST_CHANNELS = frozenset({"org.qemu.guest_agent.0"})
_NIC_KINDS = frozenset({"bridge", "network"})


def describe(
    xml: str,
    *,
    state: DomainState,
    is_persistent: bool,
    has_autostart: bool,
    volumes: Mapping[str, str],
    obstacles: tuple[str, ...],
) -> DomainDescription:
    """Return the description. `volumes`: volume ids by the path of their file, for disks that are ours."""
    root = parse(xml)
    facts = domain_facts.read(xml)
    cpu, system = root.find("cpu"), root.find("os/type")
    loader = root.find("os/loader")
    most = root.find("vcpu")
    return DomainDescription(
        uuid=facts.uuid,
        name=facts.libvirt_name,
        vm_id=facts.vm_id,
        state=state,
        is_persistent=is_persistent,
        has_autostart=has_autostart,
        arch=system.get("arch", "") if system is not None else "",
        machine=system.get("machine", "") if system is not None else "",
        cpu_mode=cpu.get("mode", "custom" if cpu.find("model") is not None else "") if cpu is not None else "",
        cpu_model=(cpu.findtext("model") or "").strip() if cpu is not None else "",
        cpu_features=cpu_features.described(cpu),
        vcpus=facts.vcpus,
        vcpus_max=int(most.text or 1) if most is not None else 1,
        memory_mib=facts.memory_mib,
        memory_max_mib=max(facts.memory_mib, _max_memory_mib(root)),
        firmware=Firmware.UEFI if loader is not None or system_firmware(root) == "efi" else Firmware.BIOS,
        has_secure_boot=loader is not None and loader.get("secure") == "yes",
        has_tpm=root.find("devices/tpm/backend[@type='emulator']") is not None,
        disks=tuple(_disk(disk, volumes) for disk in root.findall("devices/disk")),
        nics=tuple(_nic(card) for card in root.findall("devices/interface")),
        kept=_kept(root),
        obstacles=(*obstacles, *_obstacles(root, xml)),
        squeezed_to_mib=facts.squeezed_to_mib,
        original_xml=xml if len(xml.encode()) <= ORIGINAL_MAX_BYTES else "",
    )


def system_firmware(root: Element) -> str:
    system = root.find("os")
    return system.get("firmware", "") if system is not None else ""


def _max_memory_mib(root: Element) -> int:
    most = root.find("maxMemory")
    return domain_facts.kib(float(most.text or 0), most.get("unit", "KiB")) // 1024 if most is not None else 0


def _disk(disk: Element, volumes: Mapping[str, str]) -> DescribedDisk:
    target, source, driver, boot = disk.find("target"), disk.find("source"), disk.find("driver"), disk.find("boot")
    path = source.get("file", "") if source is not None else ""
    device = disk.get("device", "disk")
    return DescribedDisk(
        target=target.get("dev", "") if target is not None else "",
        device=device,
        path=path,
        format=driver.get("type", "raw") if driver is not None else "raw",
        bus=target.get("bus", "") if target is not None else "",
        is_read_only=disk.find("readonly") is not None,
        boot_order=int(boot.get("order", "0")) if boot is not None else 0,
        problem=_disk_problem(disk, path) if device == "disk" else "",
        volume_id=volumes.get(path, ""),
        cache=driver.get("cache", "") if driver is not None else "",
        iops_limit=int(disk.findtext("iotune/total_iops_sec") or 0),
        bandwidth_limit_bytes_s=int(disk.findtext("iotune/total_bytes_sec") or 0),
    )


def _disk_problem(disk: Element, path: str) -> str:
    if disk.get("type") != "file" or not path:
        return f"it is of type {disk.get('type', 'unknown')}, and only files can be volumes"
    if disk.find("backingStore/source") is not None:
        return "it lies over a backing file; `virsh blockpull DOMAIN TARGET --wait` makes it whole"
    if disk.find("mirror") is not None:
        return "a block job is under way on it; wait for its end or abort it with `virsh blockjob`"
    if disk.find("shareable") is not None:
        return "it is marked shareable: several domains write to it"
    if disk.find("source/encryption") is not None or disk.find("encryption") is not None:
        return "it is encrypted by QEMU"
    return ""


def _nic(card: Element) -> DescribedNic:
    mac, source, model = card.find("mac"), card.find("source"), card.find("model")
    kind = card.get("type", "")
    return DescribedNic(
        mac=mac.get("address", "").lower() if mac is not None else "",
        model=model.get("type", "") if model is not None else "",
        # A live one on a libvirt network shows the network's bridge too.
        bridge=source.get("bridge", "") if source is not None and kind == "bridge" else "",
        network=source.get("network", "") if source is not None and kind == "network" else "",
        kind=kind,
    )


def _kept(root: Element) -> tuple[str, ...]:
    found = Counter(child.tag for child in root if child.tag not in _EXPRESSED and "}" not in child.tag)
    for device in root.findall("devices/*"):
        if device.tag == "channel":
            target = device.find("target")
            if device.get("type") == "unix" and target is not None and target.get("name") in _GUEST_CHANNELS:
                continue
        elif device.tag == "graphics":
            if device.get("type") == "vnc":
                continue
        elif device.tag == "disk" and device.get("device") not in (None, "disk", "cdrom"):
            found[f"devices/disk ({device.get('device')})"] += 1
            continue
        elif device.tag in _EXPRESSED_DEVICES:
            continue
        kind = device.get("type") or device.get("model") or ""
        found[f"devices/{device.tag}{f' ({kind})' if kind else ''}"] += 1
    return tuple(f"{name} x{count}" if count > 1 else name for name, count in sorted(found.items()))


def _obstacles(root: Element, xml: str) -> tuple[str, ...]:
    found = []
    if root.find("devices/hostdev") is not None or root.find("devices/interface[@type='hostdev']") is not None:
        found.append("a device of its host is passed through to it; detach it with `virsh detach-device` first")
    loader = (root.findtext("os/loader") or "").strip()
    if loader and loader not in LOADERS:
        found.append(f"its firmware is {loader}, whose variables fit no other; only {' and '.join(LOADERS)} can be taken over")
    kinds = {card.get("type", "") for card in root.findall("devices/interface")} - {*_NIC_KINDS, "hostdev"}
    found += [
        f"a network card is of type {kind}; only bridges and libvirt's networks can be taken over" for kind in sorted(kinds)
    ]
    if len(xml.encode()) > ORIGINAL_MAX_BYTES:
        found.append(f"its definition has more than {ORIGINAL_MAX_BYTES >> 10} KiB")
    return tuple(found)
