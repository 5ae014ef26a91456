"""What the host is: read from libvirt's capabilities, sysfs and the machine's own files."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import libvirt

from trimtab_agent.hypervisor.kvm import domain_facts, overlays, uplinks
from trimtab_agent.hypervisor.kvm.config import KvmConfig
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.cpu_features import HostFeatures, HostFeaturesReader
from trimtab_agent.hypervisor.kvm.guarded import GuardedCalls, Hung
from trimtab_agent.hypervisor.kvm.guest_qemus import GuestQemus
from trimtab_agent.hypervisor.kvm.host_links import read_bridges, read_switches
from trimtab_agent.hypervisor.kvm.huge_pages import mounted_sizes_kib
from trimtab_agent.hypervisor.kvm.uplinks import Uplinks
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DomainSpec, Firmware, Inventory, NumaCell, PciDevice

CAPABILITIES = (
    "adopt",
    "apply-domain",
    "backup-hooks",
    "backup-raw",
    "cdrom",
    "console",
    "console-log",
    "copy-disks",
    "grow-volume",
    "host-devices",
    "image-iso",
    "image-qcow2",
    "image-raw",
    "layers",
    "migrate",
    "migrate-auto-converge",
    "migrate-flat",
    "migrate-postcopy",
    "network-bridge",
    "network-isolated",
    "network-nat",
    "network-wire",
    "numa-tuning",
    "optional-cpu-features",
    "outer-networks",
    "pool-dir",
    "pool-iscsi",
    "pool-lvm_thin",
    "pool-nfs",
    "pool-rbd",
    "rbd-layers",
    "restore-raw",
    "seed-nocloud",
    "volume-linked-clone",
    "volume-luks",
    "volume-move",
)
_DEFAULT_MACHINE = "q35"
_UEFI_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
_TPM_PROGRAMS = (Path("/usr/bin/swtpm"), Path("/usr/bin/swtpm_setup"))
_STAT_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class GuestTraits:
    """What guests of this host may be."""

    machines: tuple[str, ...]
    usable_cpu_models: tuple[str, ...]
    cpu_features: HostFeatures
    has_uefi: bool


@dataclass(frozen=True, slots=True)
class _Unmanaged:
    vcpus: int
    memory_mib: int
    disk_bytes: int
    macs: tuple[str, ...]
    ours: tuple[tuple[str, str], ...]
    """Not unmanaged: vm ids of our guests that run, with libvirt's names."""


_NOBODYS = _Unmanaged(vcpus=0, memory_mib=0, disk_bytes=0, macs=(), ours=())


class InventoryReader:
    """Reads the inventory. Thread-safe."""

    def __init__(self, config: KvmConfig, connection: Connection, *, boot_id: str, accelerator: Callable[[], str]) -> None:
        self._config = config
        self._connection = connection
        self._boot_id = boot_id
        self._accelerator = accelerator
        self._guarded = GuardedCalls()
        self._qemus = GuestQemus()
        self._features = HostFeaturesReader()
        self._reading = threading.Lock()
        self._uplinks = Uplinks(config.state_dir / uplinks.FILE_NAME)

    def read(self, *, only_fitness: bool = False) -> Inventory:
        """Return what the host is now. See `Hypervisor.inventory`."""
        accelerator = self._accelerator()
        unmanaged, devices = _NOBODYS, tuple[PciDevice, ...]()
        with self._connection.use("read the host's inventory") as connection:
            host = parse(connection.getCapabilities())
            traits = self._traits(connection, host)
            if not only_fitness:
                unmanaged = self._unmanaged(connection)
                devices = _pci_devices(connection)
            emulator = host.findtext("guest/arch[@name='x86_64']/emulator") or ""
            versions = _version(connection.getLibVersion()), _version(connection.getVersion())
            cpus = connection.getInfo()[2]
        memory_mib = _memory_mib()
        with self._reading:
            qemu_build, guest_qemus = self._qemus.read(Path(emulator), unmanaged.ours) if not only_fitness else ("", ())
        return Inventory(
            hostname=socket.gethostname(),
            arch=host.findtext("host/cpu/arch") or os.uname().machine,
            machine_id=_first_line(Path("/etc/machine-id")),
            smbios_uuid=_first_line(Path("/sys/class/dmi/id/product_uuid")).lower() or (host.findtext("host/uuid") or ""),
            boot_id=self._boot_id,
            kernel=os.uname().release,
            agent_version=self._config.agent_version,
            libvirt_version=versions[0],
            qemu_version=versions[1],
            accelerator=accelerator,
            cpu_vendor=host.findtext("host/cpu/vendor") or "",
            cpu_model=host.findtext("host/cpu/model") or "",
            cpus=cpus,
            memory_mib=memory_mib,
            cpu_features=traits.cpu_features.names,
            usable_cpu_models=traits.usable_cpu_models,
            machines=traits.machines,
            numa_cells=_numa_cells(host, memory_mib, mounted_sizes_kib()),
            pci_devices=devices,
            bridges=self._uplinks.judge(read_bridges(switches=read_switches())),
            overlay_chassis=overlays.chassis(),
            capabilities=(*CAPABILITIES, *self._more_capabilities(traits)),
            unmanaged_vcpus=unmanaged.vcpus,
            unmanaged_memory_mib=unmanaged.memory_mib,
            unmanaged_disk_bytes=unmanaged.disk_bytes,
            unmanaged_macs=unmanaged.macs,
            has_uefi=traits.has_uefi,
            migration_address=self._config.migration_address,
            qemu_build=qemu_build,
            guest_qemus=guest_qemus,
        )

    def _more_capabilities(self, traits: GuestTraits) -> tuple[str, ...]:
        """Return those that depend on the host."""
        more = (
            ("migrate-tls", self._config.has_tls),
            ("tpm", has_tpm()),
            ("all-cpu-features", traits.cpu_features.are_all),
        )
        return tuple(name for name, is_there in more if is_there)

    def guest_traits(self) -> GuestTraits:
        """Return what guests may be, under the acceleration that really runs."""
        with self._connection.use("read what guests the host can run") as connection:
            return self._traits(connection, parse(connection.getCapabilities()))

    def _traits(self, connection: Any, host: ElementTree.Element) -> GuestTraits:
        domain_type = "kvm" if self._accelerator() == "kvm" else "qemu"
        offered = parse(connection.getDomainCapabilities(None, "x86_64", _DEFAULT_MACHINE, domain_type, 0))
        return GuestTraits(
            machines=_machines(host),
            usable_cpu_models=tuple(
                sorted(model.text or "" for model in offered.findall("cpu/mode[@name='custom']/model[@usable='yes']"))
            ),
            cpu_features=self._features.read(connection, offered, machine=_DEFAULT_MACHINE, domain_type=domain_type),
            has_uefi=_UEFI_CODE.exists(),
        )

    def refuse_unfit(self, domain: DomainSpec) -> None:
        """Raise Conflict where this host cannot run such a domain at all."""
        traits = self.guest_traits()
        if domain.machine not in traits.machines:
            raise Conflict("not-supported-here", f"this host's QEMU has no machine type {domain.machine}", machine=domain.machine)
        if domain.cpu_model not in traits.usable_cpu_models:
            raise Conflict("cpu-incompatible", f"this host cannot run CPU model {domain.cpu_model}", cpu_model=domain.cpu_model)
        if domain.firmware is Firmware.UEFI and not traits.has_uefi:
            raise Conflict("uefi-not-here", "this host has no UEFI firmware; install ovmf")
        if domain.has_tpm and not has_tpm():
            raise Conflict("tpm-not-here", "this host has no software TPM; install swtpm-tools")

    def _unmanaged(self, connection: Any) -> _Unmanaged:
        vcpus = memory_mib = disk_bytes = 0
        macs: set[str] = set()
        ours = []
        for domain in connection.listAllDomains():
            try:
                facts = domain_facts.read(domain.XMLDesc(0))
                is_active = bool(domain.isActive())
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    continue
                raise
            if facts.vm_id:
                ours += [(facts.vm_id, facts.libvirt_name)] if is_active else []
                continue
            macs.update(facts.macs)
            disk_bytes += sum(self._allocated_bytes(path) for path in facts.disk_paths)
            if is_active:
                vcpus, memory_mib = vcpus + facts.vcpus, memory_mib + facts.memory_mib
        return _Unmanaged(vcpus=vcpus, memory_mib=memory_mib, disk_bytes=disk_bytes, macs=tuple(sorted(macs)), ours=tuple(ours))

    def _allocated_bytes(self, path: str) -> int:
        # Guarded: an unmanaged guest's disk may lie on storage that hangs.
        with contextlib.suppress(OSError, Hung):
            return self._guarded.run(os.path.dirname(path), lambda: os.stat(path).st_blocks * 512, timeout_s=_STAT_TIMEOUT_S)
        return 0


def read_boot_id() -> str:
    """Return the id of this boot of the host."""
    return _first_line(Path("/proc/sys/kernel/random/boot_id"))


def _machines(host: ElementTree.Element) -> tuple[str, ...]:
    """Return the concrete machine types, leaving out aliases: a vm keeps one for life."""
    names = set()
    for machine in host.findall("guest/arch[@name='x86_64']/machine"):
        if not machine.get("canonical") and (machine.text or "").startswith("pc-q35-"):
            names.add(machine.text or "")
        elif (machine.get("canonical") or "").startswith("pc-q35-"):
            names.add(machine.get("canonical") or "")
    return tuple(sorted(names))


def _memory_mib() -> int:
    """Return the host's memory. Not from libvirt: on some machines with hot-plugged memory it counts the first block only."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) >> 10
    return 0


def _numa_cells(host: ElementTree.Element, memory_mib: int, page_sizes_kib: Collection[int]) -> tuple[NumaCell, ...]:
    cells = []
    found = host.findall("host/topology/cells/cell")
    for cell in found:
        memory_kib = int(cell.findtext("memory") or 0)
        huge_pages = {int(pages.get("size", 0)): int(pages.text or 0) for pages in cell.findall("pages")}
        cells.append(
            NumaCell(
                index=int(cell.get("id", 0)),
                memory_mib=memory_mib if len(found) == 1 else memory_kib >> 10,
                cpus=tuple(sorted(int(cpu.get("id", 0)) for cpu in cell.findall("cpus/cpu"))),
                huge_pages={size: count for size, count in huge_pages.items() if count and size in page_sizes_kib},
            )
        )
    return tuple(cells)


def _pci_devices(connection: Any) -> tuple[PciDevice, ...]:
    devices = []
    try:
        found = connection.listAllDevices(libvirt.VIR_CONNECT_LIST_NODE_DEVICES_CAP_PCI_DEV)
    except libvirt.libvirtError as error:
        # A libvirt without its node device driver still runs guests.
        if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:
            return ()
        raise
    for device in found:
        try:
            root = parse(device.XMLDesc(0))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_NODE_DEVICE:
                continue
            raise
        devices.append(_pci_device(root))
    return tuple(sorted(devices, key=lambda device: device.address))


def _pci_device(root: ElementTree.Element) -> PciDevice:
    capability = root.find("capability[@type='pci']")
    assert capability is not None, "libvirt listed a device without the capability it was listed for"
    place = [int(capability.findtext(part) or 0) for part in ("domain", "bus", "slot", "function")]
    group, numa = capability.find("iommuGroup"), capability.find("numa")
    vendor, product = capability.find("vendor"), capability.find("product")
    return PciDevice(
        address=f"{place[0]:04x}:{place[1]:02x}:{place[2]:02x}.{place[3]:x}",
        vendor_id=vendor.get("id", "") if vendor is not None else "",
        product_id=product.get("id", "") if product is not None else "",
        class_id=capability.findtext("class") or "",
        driver=root.findtext("driver/name") or "",
        iommu_group=int(group.get("number", -1)) if group is not None else -1,
        numa_cell=int(numa.get("node", -1)) if numa is not None else -1,
    )


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _first_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().partition("\n")[0].strip()
    return ""


def has_tpm() -> bool:
    """Tell whether libvirt finds what it needs to give a guest a TPM."""
    return all(program.exists() for program in _TPM_PROGRAMS)
