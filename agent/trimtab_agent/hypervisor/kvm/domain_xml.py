"""Builds a vm's libvirt definition from typed fields. Pure: no clock, no files, no libvirt.

Only the tree API writes text, every word is checked by pattern first, and paths derive from ids (`pool_layout`), so nothing that a
user typed can become an element, a file name or a QEMU argument. There is no user XML.

Guest devices sit at PCI addresses that are functions of their index, not of the order of their making, so that defining a vm anew,
on any host, after any number of hot-plugs, gives the guest the same hardware:

    bus 0    slot 1 video, slots 2.. root ports (8 functions each), 1e memory to be plugged, 1f the chipset
    bus 1..5 virtio-serial, balloon, rng, seed, SCSI controller
    bus 6 + 2·index  disk        bus 7 + 2·index  network card
"""

import ipaddress
import string
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from trimtab_agent.hypervisor.base import Stamp, restarts_elsewhere
from trimtab_agent.hypervisor.kvm import block_pools, cpu_features, hostdev_xml, numa_xml, resource_xml, volume_keys, wires
from trimtab_agent.hypervisor.kvm.identifiers import (
    check_cpu_word,
    check_id,
    check_mac,
    check_machine,
    check_range,
    check_uuid,
    domain_name,
)
from trimtab_agent.hypervisor.kvm.networks import bridge_of, libvirt_network_name
from trimtab_agent.hypervisor.kvm.packet_rules import tap_name
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_agent.hypervisor.kvm.stamp_xml import stamp_metadata
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.device_messages import CdromSpec
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DiskBus, DiskFormat, DiskSpec, DomainSpec, Firmware, NetworkKind, NicSpec

METADATA_NAMESPACE = "urn:trimtab:domain:1"
METADATA_PREFIX = "trimtab"
GUEST_AGENT_CHANNEL = "org.qemu.guest_agent.0"
SERIAL_BYTES = 20
"""What a virtio-blk serial number holds; the random end of a volume id fits, its kind and time do not."""

_SERIAL_BUS, _BALLOON_BUS, _RNG_BUS, _SEED_BUS, _SCSI_BUS, _FIRST_INDEXED_BUS = 1, 2, 3, 4, 5, 6
_MAX_INDEX = 23
_SEED_TARGET = "vdz"
_CDROM_TARGET, DRIVERS_TARGET = "sdz", "sdy"
CDROM_ALIAS, DRIVERS_ALIAS = "ua-cdrom", "ua-drivers"
_SATA_CDROM_UNIT = 5
"""The last port of the chipset's SATA controller; the drive with drivers, then disks, take those before it."""
_TCG_CACHE_MIB = 32
# A vcpu that is added needs a region of the cache for itself. QEMU 7.2 ends at an assertion (tcg_region_initial_alloc) where a booted
# guest has filled them all, which 32 MiB do not outlast: seen in the lab. Only what is used takes memory.
_TCG_CACHE_GROWING_MIB = 256
"""QEMU would keep up to 1 GiB of translated code per guest otherwise."""
_MEMORY_SLOTS = 16
_MEMORY_DEVICE_SLOT = 0x1E
MEMORY_ALIAS = "ua-memory"
MEMORY_STEP_MIB = 2
"""Memory is plugged in such steps: the size of a huge page."""
GUEST_MEMORY_BLOCK_MIB = 128
"""Linux on x86 adds memory in blocks of this size; of a device that ends within one it cannot use the rest."""
_MAX_VCPUS = 240
_MAX_MEMORY_MIB = 12 << 20
_MAX_SPARE_PORTS = 32
_MAX_LIMIT = 1 << 50


@dataclass(frozen=True, slots=True)
class Export:
    """What a volume that is being filled from a backup still reads from."""

    name: str
    socket: str


NO_EXPORTS: Mapping[str, Export] = {}
_NIC_MODELS = ("virtio", "e1000e")

_OVMF = "/usr/share/OVMF"
_LOADER = {False: f"{_OVMF}/OVMF_CODE_4M.fd", True: f"{_OVMF}/OVMF_CODE_4M.ms.fd"}
LOADERS = tuple(_LOADER.values())
NVRAM_TEMPLATE = {False: f"{_OVMF}/OVMF_VARS_4M.fd", True: f"{_OVMF}/OVMF_VARS_4M.ms.fd"}

ElementTree.register_namespace(METADATA_PREFIX, METADATA_NAMESPACE)


@dataclass(frozen=True, slots=True)
class HostTraits:
    """What of the host goes into a definition."""

    accelerator: str
    """`kvm` or `tcg`."""
    console_log: str
    """Path of this vm's serial log."""
    console_socket: str
    """Where QEMU listens for one who is at the serial port."""
    cpu_shares: int = 1024
    """What libvirt counts for a guest of which nothing is said: 1024 where the kernel's control groups are v1, 100 where they are v2."""


def build(
    domain: DomainSpec, stamp: Stamp, host: HostTraits, *, boot_id: str = "", exports: Mapping[str, Export] = NO_EXPORTS
) -> str:
    """Return the XML of the domain. InvalidRequest names the field that cannot be expressed.

    `boot_id` is the host's boot during which the domain was last started, "" when it is known to be stopped. `exports` are those of
    its volumes that do not stand alone yet.
    """
    _check(domain)
    pools = PoolLayout.of_files(domain.pools)
    root = Element("domain", type="kvm" if host.accelerator == "kvm" else "qemu")
    _text(root, "name", domain_name(domain.vm_id))
    _text(root, "uuid", check_uuid(domain.uuid))
    SubElement(root, "metadata").append(_metadata(domain, stamp, boot_id=boot_id))
    _memory_and_cpus(root, domain)
    numa_xml.place(root, domain)
    resource_xml.place(root, domain, cpu_shares=host.cpu_shares)
    _firmware(root, domain)
    _features(root, domain, host)
    _cpu(root, domain)
    _clock(root, domain)
    for event, action in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
        _text(root, event, action)
    devices = SubElement(root, "devices")
    _text(devices, "emulator", "/usr/bin/qemu-system-x86_64")
    _controllers(devices, domain)
    for disk in _in_order(domain.disks):
        _disk(devices, disk, domain, pools, exports.get(disk.volume_id))
    if domain.cdrom is not None:
        _cdrom(devices, domain.cdrom, pools, target=_CDROM_TARGET, alias=CDROM_ALIAS, unit=_SATA_CDROM_UNIT)
    if domain.drivers is not None:
        _cdrom(devices, domain.drivers, pools, target=DRIVERS_TARGET, alias=DRIVERS_ALIAS, unit=_SATA_CDROM_UNIT - 1)
    if domain.seed is not None:
        _seed_disk(devices, state_layout(domain).seed(domain.vm_id))
    for nic in sorted(domain.nics, key=lambda each: each.index):
        _nic(devices, nic, domain)
    _fixed_devices(devices, host)
    hostdev_xml.give(devices, domain)
    _plugged_memory(devices, domain)
    if domain.has_tpm:
        tpm = SubElement(devices, "tpm", model="tpm-crb")
        SubElement(tpm, "backend", type="emulator", version="2.0")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def boot_disk(domain: DomainSpec) -> DiskSpec | None:
    """Return the disk that the vm boots from: the lowest boot order, else the lowest index."""
    bootable = [disk for disk in domain.disks if disk.boot_order]
    if bootable:
        return min(bootable, key=lambda disk: disk.boot_order)
    return min(domain.disks, key=lambda disk: disk.index, default=None)


def state_layout(domain: DomainSpec) -> PoolLayout:
    """Return the pool that holds seed and NVRAM: the boot disk's, or the first pool of a vm without disks."""
    disk = boot_disk(domain)
    files = PoolLayout.of_files(domain.pools)
    if disk is not None and disk.pool_id in files:
        return files[disk.pool_id]
    # One that boots from a LUN keeps them beside its first disk that is a file.
    for other in _in_order(domain.disks):
        if other.pool_id in files:
            return files[other.pool_id]
    if disk is None and files:
        return next(iter(files.values()))
    raise InvalidRequest("pool-missing", "the vm names no pool that could hold its seed and NVRAM", field="pools")


def target_name(disk: DiskSpec) -> str:
    """Return the device name libvirt knows the disk by; only virtio names match what a guest sees."""
    return ("vd" if disk.bus is DiskBus.VIRTIO else "sd") + string.ascii_lowercase[disk.index]


def _check(domain: DomainSpec) -> None:
    check_id(domain.vm_id, "vm_id")
    check_machine(domain.machine)
    if domain.arch != "x86_64":
        raise InvalidRequest("arch-unknown", f"arch {domain.arch[:20]!r}: this host runs x86_64", field="arch")
    check_range(domain.vcpus_max, "vcpus_max", low=1, high=_MAX_VCPUS)
    check_range(domain.vcpus, "vcpus", low=1, high=domain.vcpus_max)
    check_range(domain.memory_mib, "memory_mib", low=16, high=_MAX_MEMORY_MIB)
    check_range(domain.memory_max_mib or domain.memory_mib, "memory_max_mib", low=domain.memory_mib, high=_MAX_MEMORY_MIB)
    numa_xml.check(domain)
    resource_xml.check(domain)
    hostdev_xml.check(domain)
    check_range(domain.spare_pcie_ports, "spare_pcie_ports", low=0, high=_MAX_SPARE_PORTS)
    if domain.has_secure_boot and domain.firmware is not Firmware.UEFI:
        raise InvalidRequest("secure-boot-needs-uefi", "secure boot needs firmware uefi", field="has_secure_boot")
    for disk in domain.disks:
        if disk.bus is DiskBus.SATA:
            check_range(disk.index, "disks.index", low=0, high=_SATA_CDROM_UNIT - (2 if domain.drivers else 1))
    for field, things in (("disks", domain.disks), ("nics", domain.nics)):
        indices = [thing.index for thing in things]
        for index in indices:
            check_range(index, f"{field}.index", low=0, high=_MAX_INDEX)
        if len(set(indices)) != len(indices):
            raise InvalidRequest("index-taken", f"two of {field} have the same index", field=field)


def _memory_and_cpus(root: Element, domain: DomainSpec) -> None:
    # libvirt's <memory> counts the empty device too. A definition that goes along with a migration is not corrected as a new one is:
    # libvirt 9.0 takes the device's size off it and refuses what is left of nothing.
    with_room_mib = domain.memory_mib + plugged_room_mib(domain)
    if domain.memory_max_mib > domain.memory_mib:
        SubElement(root, "maxMemory", slots=str(_MEMORY_SLOTS), unit="MiB").text = str(with_room_mib)
    SubElement(root, "memory", unit="MiB").text = str(with_room_mib)
    SubElement(root, "currentMemory", unit="MiB").text = str(domain.memory_mib)
    SubElement(root, "vcpu", placement="static", current=str(domain.vcpus)).text = str(domain.vcpus_max)
    if domain.vcpus_max > domain.vcpus:
        _hotpluggable_vcpus(root, domain)


def _hotpluggable_vcpus(root: Element, domain: DomainSpec) -> None:
    """Say that every vcpu but the first can be unplugged: those that a guest starts with could not be otherwise."""
    vcpus = SubElement(root, "vcpus")
    for number in range(domain.vcpus_max):
        is_enabled = number < domain.vcpus
        vcpu = SubElement(vcpus, "vcpu", id=str(number), enabled="yes" if is_enabled else "no")
        vcpu.set("hotpluggable", "no" if number == 0 else "yes")


def plugged_room_mib(domain: DomainSpec) -> int:
    """Return the size of the device through which memory is plugged, 0 for none: whole blocks of the guest's, so that it can use all."""
    room_mib = max(0, domain.memory_max_mib - domain.memory_mib)
    return -(-room_mib // GUEST_MEMORY_BLOCK_MIB) * GUEST_MEMORY_BLOCK_MIB


def _plugged_memory(devices: Element, domain: DomainSpec) -> None:
    """Give the guest an empty virtio-mem device: memory is plugged by asking for more of it, never by adding a device."""
    if domain.memory_max_mib <= domain.memory_mib:
        return
    memory = SubElement(devices, "memory", model="virtio-mem")
    target = SubElement(memory, "target")
    SubElement(target, "size", unit="MiB").text = str(plugged_room_mib(domain))
    _text(target, "node", "0")
    SubElement(target, "block", unit="MiB").text = str(MEMORY_STEP_MIB)
    SubElement(target, "requested", unit="MiB").text = "0"
    SubElement(memory, "alias", name=MEMORY_ALIAS)
    _address(memory, bus=0, slot=_MEMORY_DEVICE_SLOT)


def _firmware(root: Element, domain: DomainSpec) -> None:
    system = SubElement(root, "os")
    SubElement(system, "type", arch="x86_64", machine=domain.machine).text = "hvm"
    if domain.firmware is Firmware.UEFI:
        loader = SubElement(system, "loader", readonly="yes", type="pflash")
        if domain.has_secure_boot:
            loader.set("secure", "yes")
        loader.text = _LOADER[domain.has_secure_boot]
        _text(system, "nvram", state_layout(domain).nvram(domain.vm_id))


def _features(root: Element, domain: DomainSpec, host: HostTraits) -> None:
    features = SubElement(root, "features")
    SubElement(features, "acpi")
    SubElement(features, "apic")
    SubElement(features, "vmport", state="off")
    if domain.has_secure_boot:
        SubElement(features, "smm", state="on")
    if domain.has_hyperv and host.accelerator == "kvm":
        # Without KVM nobody would answer the guest's hypercalls.
        hyperv = SubElement(features, "hyperv", mode="custom")
        for name in ("relaxed", "vapic"):
            SubElement(hyperv, name, state="on")
        SubElement(hyperv, "spinlocks", state="on", retries="8191")
    if host.accelerator != "kvm":
        SubElement(SubElement(features, "tcg"), "tb-cache", unit="MiB").text = str(
            _TCG_CACHE_MIB if domain.vcpus == domain.vcpus_max else _TCG_CACHE_GROWING_MIB
        )


def _cpu(root: Element, domain: DomainSpec) -> None:
    cpu = SubElement(root, "cpu", mode="custom", match="exact", check="partial")
    SubElement(cpu, "model", fallback="forbid").text = check_cpu_word(domain.cpu_model, "cpu_model")
    cpu_features.write(cpu, domain.cpu_features)
    if domain.memory_max_mib > domain.memory_mib:
        # Memory can be plugged only where there is a NUMA cell to plug it into.
        cells = SubElement(cpu, "numa")
        SubElement(cells, "cell", id="0", cpus=f"0-{domain.vcpus_max - 1}", memory=str(domain.memory_mib), unit="MiB")


def _clock(root: Element, domain: DomainSpec) -> None:
    clock = SubElement(root, "clock", offset="localtime" if domain.has_local_time_clock else "utc")
    SubElement(clock, "timer", name="rtc", tickpolicy="catchup")
    SubElement(clock, "timer", name="pit", tickpolicy="delay")
    SubElement(clock, "timer", name="hpet", present="no")
    if domain.has_hyperv:
        SubElement(clock, "timer", name="hypervclock", present="yes")


def _controllers(devices: Element, domain: DomainSpec) -> None:
    SubElement(devices, "controller", type="pci", index="0", model="pcie-root")
    for bus in range(1, _last_bus(domain) + domain.spare_pcie_ports + 1):
        port = SubElement(devices, "controller", type="pci", index=str(bus), model="pcie-root-port")
        SubElement(port, "target", chassis=str(bus), port=hex(0x10 + bus - 1))
        slot, function = divmod(bus - 1, 8)
        _address(port, bus=0, slot=2 + slot, function=function, is_multifunction=function == 0)
    _address(SubElement(devices, "controller", type="virtio-serial", index="0"), bus=_SERIAL_BUS)
    SubElement(devices, "controller", type="usb", index="0", model="none")
    if any(disk.bus is DiskBus.SCSI for disk in domain.disks):
        _address(SubElement(devices, "controller", type="scsi", index="0", model="virtio-scsi"), bus=_SCSI_BUS)


def _last_bus(domain: DomainSpec) -> int:
    disks = [_disk_bus(disk) for disk in domain.disks if disk.bus is DiskBus.VIRTIO]
    return max([_SCSI_BUS, *disks, *(_nic_bus(nic) for nic in domain.nics)])


def _disk_bus(disk: DiskSpec) -> int:
    return _FIRST_INDEXED_BUS + 2 * disk.index


def _nic_bus(nic: NicSpec) -> int:
    return _FIRST_INDEXED_BUS + 2 * nic.index + 1


def _disk(devices: Element, disk: DiskSpec, domain: DomainSpec, pools: dict[str, PoolLayout], export: Export | None) -> None:
    pool = next((each for each in domain.pools if each.pool_id == disk.pool_id), None)
    if pool is None:
        raise InvalidRequest("pool-missing", f"disk {disk.index} is in a pool that the vm does not name", field="pools")
    element = SubElement(devices, "disk", type="file", device="disk")
    SubElement(
        element,
        "driver",
        name="qemu",
        type=disk.format.value,
        cache="none",
        error_policy="stop",
        rerror_policy="stop",
        discard="unmap",
    )
    if pool.pool_id not in pools:
        block_pools.describe_source(element, disk, pool, volume_keys.secret_uuid(pool.pool_id))
    else:
        source = SubElement(element, "source", file=pools[disk.pool_id].volume(disk.volume_id, disk.format, disk.layer_id))
        if disk.is_encrypted:
            volume_keys.encrypt(source, disk.volume_id)
    if export is not None:
        _backing_export(element, export)
    SubElement(element, "target", dev=target_name(disk), bus=disk.bus.value)
    if disk.is_read_only:
        SubElement(element, "readonly")
    if disk.iops_limit or disk.bandwidth_limit_bytes_s:
        limits = SubElement(element, "iotune")
        for tag, amount in (("total_bytes_sec", disk.bandwidth_limit_bytes_s), ("total_iops_sec", disk.iops_limit)):
            if amount:
                SubElement(limits, tag).text = str(check_range(amount, tag, low=1, high=_MAX_LIMIT))
    SubElement(element, "serial").text = disk.volume_id[-SERIAL_BYTES:]
    order = _boot_order(disk, domain)
    if order:
        SubElement(element, "boot", order=str(order))
    SubElement(element, "alias", name=f"ua-{disk.volume_id}")
    if disk.bus is DiskBus.VIRTIO:
        _address(element, bus=_disk_bus(disk))
    else:
        SubElement(element, "address", type="drive", controller="0", bus="0", target="0", unit=str(disk.index))


def _backing_export(element: Element, export: Export) -> None:
    """Named here and not left to be found in the header: what libvirt may open is what we wrote."""
    backing = SubElement(element, "backingStore", type="network")
    SubElement(backing, "format", type="raw")
    source = SubElement(backing, "source", protocol="nbd", name=export.name)
    SubElement(source, "host", transport="unix", socket=export.socket)
    SubElement(backing, "backingStore")


def _boot_order(disk: DiskSpec, domain: DomainSpec) -> int:
    """A vm whose disks name no order boots from its first one."""
    if any(each.boot_order for each in domain.disks):
        return check_range(disk.boot_order, "boot_order", low=0, high=_MAX_INDEX + 1)
    return 1 if disk == boot_disk(domain) else 0


def _cdrom(devices: Element, cdrom: CdromSpec, pools: dict[str, PoolLayout], *, target: str, alias: str, unit: int) -> None:
    # SATA: the only drive that installers without drivers of ours, Windows' and FreeDOS' among them, know.
    element = SubElement(devices, "disk", type="file", device="cdrom")
    SubElement(element, "driver", name="qemu", type="raw")
    if cdrom.image_id:
        SubElement(element, "source", file=iso_path(cdrom, pools))
    SubElement(element, "target", dev=target, bus="sata")
    SubElement(element, "readonly")
    order = check_range(cdrom.boot_order, "cdrom.boot_order", low=0, high=_MAX_INDEX + 2)
    if order:
        SubElement(element, "boot", order=str(order))
    SubElement(element, "alias", name=alias)
    SubElement(element, "address", type="drive", controller="0", bus="0", target="0", unit=str(unit))


def iso_path(cdrom: CdromSpec, pools: Mapping[str, PoolLayout]) -> str:
    """Return where the drive's image is on this host."""
    if cdrom.pool_id not in pools:
        raise InvalidRequest("pool-missing", "the CD-ROM's image is in a pool that the vm does not name", field="pools")
    return pools[cdrom.pool_id].image(cdrom.image_id, DiskFormat.ISO)


def _seed_disk(devices: Element, path: str) -> None:
    # A disk and not a cdrom: cloud kernels carry no AHCI driver, and NoCloud looks at labels only.
    element = SubElement(devices, "disk", type="file", device="disk")
    SubElement(element, "driver", name="qemu", type="raw", cache="none")
    SubElement(element, "source", file=path)
    SubElement(element, "target", dev=_SEED_TARGET, bus="virtio")
    SubElement(element, "readonly")
    SubElement(element, "alias", name="ua-seed")
    _address(element, bus=_SEED_BUS)


def _nic(devices: Element, nic: NicSpec, domain: DomainSpec) -> None:
    network = next((each for each in domain.networks if each.network_id == nic.network_id), None)
    if network is None:
        raise InvalidRequest("network-missing", f"nic {nic.index} is on a network that the vm does not name", field="networks")
    if nic.model not in _NIC_MODELS:
        raise InvalidRequest("nic-model", f"nic model {nic.model[:20]!r} must be one of {', '.join(_NIC_MODELS)}", field="model")
    for address in nic.addresses:
        _check_address(address)
    check_range(network.mtu, "mtu", low=576, high=65520)
    if network.kind is NetworkKind.WIRE:
        element = wires.interface(devices, nic.nic_id)
    elif bridge := bridge_of(network, nic.nic_id):
        element = SubElement(devices, "interface", type="bridge")
        SubElement(element, "source", bridge=bridge)
    else:
        element = SubElement(devices, "interface", type="network")
        SubElement(element, "source", network=libvirt_network_name(network.network_id))
    SubElement(element, "mac", address=check_mac(nic.mac))
    if network.kind is not NetworkKind.WIRE:
        SubElement(element, "target", dev=tap_name(nic.nic_id))
    SubElement(element, "model", type=nic.model)
    if network.kind is not NetworkKind.WIRE:
        SubElement(element, "mtu", size=str(network.mtu))
    SubElement(element, "alias", name=f"ua-{nic.nic_id}")
    _address(element, bus=_nic_bus(nic))


def _check_address(address: str) -> None:
    try:
        ipaddress.ip_interface(address)
    except ValueError as error:
        raise InvalidRequest(
            "nic-address",
            f"address {address[:50]!r} must be an address with prefix length, such as 10.0.0.5/24",
            field="addresses",
        ) from error


def _fixed_devices(devices: Element, host: HostTraits) -> None:
    # libvirt shows the first serial port as the console too, and wants both to say the same.
    for tag, kind in (("serial", "isa-serial"), ("console", "serial")):
        port = SubElement(devices, tag, type="unix")
        SubElement(port, "source", mode="bind", path=host.console_socket)
        # Appended to, so that it can be cut short under QEMU's open descriptor and a restart keeps what was there.
        SubElement(port, "log", file=host.console_log, append="on")
        SubElement(port, "target", type=kind, port="0")
    channel = SubElement(devices, "channel", type="unix")
    SubElement(channel, "target", type="virtio", name=GUEST_AGENT_CHANNEL)
    SubElement(channel, "address", type="virtio-serial", controller="0", bus="0", port="1")
    graphics = SubElement(devices, "graphics", type="vnc")
    # libvirt puts the socket into the domain's own runtime directory, where only QEMU and root reach it.
    SubElement(graphics, "listen", type="socket")
    video = SubElement(devices, "video")
    SubElement(video, "model", type="vga", vram="16384", heads="1", primary="yes")
    _address(video, bus=0, slot=1)
    # A guest that runs out takes memory back by itself, faster than the agent looks. Without a floor too: one that is told while it
    # runs finds the device as it was started, and a guest that was squeezed then killed its processes.
    balloon = SubElement(devices, "memballoon", model="virtio", autodeflate="on")
    SubElement(balloon, "stats", period="5")
    _address(balloon, bus=_BALLOON_BUS)
    rng = SubElement(devices, "rng", model="virtio")
    SubElement(rng, "backend", model="random").text = "/dev/urandom"
    _address(rng, bus=_RNG_BUS)


def _address(element: Element, *, bus: int, slot: int = 0, function: int = 0, is_multifunction: bool = False) -> None:
    place = {"type": "pci", "domain": "0x0000", "bus": f"0x{bus:02x}", "slot": f"0x{slot:02x}", "function": f"0x{function:x}"}
    address = SubElement(element, "address", place)
    if is_multifunction:
        address.set("multifunction", "on")


def _in_order(disks: tuple[DiskSpec, ...]) -> list[DiskSpec]:
    return sorted(disks, key=lambda disk: disk.index)


def _text(parent: Element, tag: str, text: str) -> None:
    SubElement(parent, tag).text = text


def _metadata(domain: DomainSpec, stamp: Stamp, *, boot_id: str) -> Element:
    """Return the element that makes a domain ours and from which a lost journal is rebuilt."""
    text = stamp_metadata(
        domain.vm_id,
        name=domain.name,
        project=domain.project,
        stamp=stamp,
        boot_id=boot_id,
        restarts_elsewhere=restarts_elsewhere(domain),
    )
    element = parse(text)
    for each in element.iter():
        each.tag = _ours(each.tag)
    return element


def _ours(tag: str) -> str:
    return f"{{{METADATA_NAMESPACE}}}{tag}"
