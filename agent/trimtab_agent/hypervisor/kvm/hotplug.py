"""Makes a running domain equal its spec, part by part, and says what the guest has not taken.

A guest is asked, not told: it must bring a new vcpu online, give memory back, let go of a disk. So nothing is concluded from a call
that returned; libvirt's view is read again, and what differs after a while is `left` for a repeat or for the next stop.

The order matters. Devices go before they come, since a new one may take the slot of one that left. Memory is settled before a vcpu
is unplugged: a QEMU that was given memory after its guest had refused to unplug a vcpu died (2 of 2 runs, QEMU 7.2). Memory is
plugged by asking one virtio-mem device for more, never by adding a device.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import libvirt
import structlog

from trimtab_agent.hypervisor.base import Applied, Stamp
from trimtab_agent.hypervisor.kvm import block_pools, domain_facts, errors, resource_xml, volumes
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domain_xml import DRIVERS_ALIAS, MEMORY_ALIAS, MEMORY_STEP_MIB
from trimtab_agent.hypervisor.kvm.domains import Domains, find, is_adopted, require, require_volumes
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.networks import Networks
from trimtab_agent.hypervisor.kvm.observe import Observer
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys, needed_by
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import Conflict, TrimtabError
from trimtab_protos.messages import ChangedPart, ChangeLeft, DomainSpec, PoolSpec, VolumeObservation, VolumeSpec

log = structlog.get_logger(__name__)

# A guest that is awake answers within a second; libvirt itself waits 5 s for a vcpu.
DEVICE_WAIT_S = 4.0
MEMORY_WAIT_S = 4.0
AGENT_WAIT_S = 3.0
_POLL_S = 0.1
T = TypeVar("T")
_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE
_KINDS = {"disk": ChangedPart.DISK, "interface": ChangedPart.NIC}
_DEVICE_ALIASES = ("ua-vol-", "ua-nic-")


class Hotplug:
    """Applies specs to domains. Thread-safe."""

    def __init__(
        self, connection: Connection, domains: Domains, observer: Observer, networks: Networks, keys: VolumeKeys
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._domains = domains
        self._observer = observer
        self._networks = networks
        # Running domains, by (UUID, run), that were given vcpus which their guest has not been seen to use.
        self._given_vcpus: set[tuple[str, int]] = set()
        self._online_vcpus: dict[str, tuple[int, int]] = {}
        """By UUID the run, and how many vcpus the guest was last seen to use: all that it had then."""

    def apply(self, spec: DomainSpec, stamp: Stamp) -> Applied:
        """See `Hypervisor.apply_domain`."""
        self._domains.check(spec)
        with self._domains.locks.hold(check_id(spec.vm_id, "vm_id")):
            self._domains.define_locked(spec, stamp)
            with self._connection.use(f"change {spec.vm_id}", changes=True) as connection:
                domain = require(connection, spec.vm_id)
                if domain.isActive() and is_adopted(domain):
                    raise Conflict(
                        "adopted-definition",
                        f"{spec.vm_id} keeps the definition it was adopted with until it is stopped; stop and start it first",
                    )
                left = self._apply_live(connection, domain, spec) if domain.isActive() else ()
                return Applied(self._observer.observe(domain), left)

    def grow_volume(self, volume: VolumeSpec, layout: PoolLayout, vm_id: str) -> VolumeObservation:
        """See `Hypervisor.resize_volume`."""
        if not vm_id:
            return self._grow_file(volume, layout)
        with (
            self._domains.locks.hold(check_id(vm_id, "vm_id")),
            self._connection.use(f"grow volume {volume.volume_id}", changes=True) as connection,
        ):
            domain = find(connection, vm_id)
            if domain is None or not domain.isActive():
                return self._grow_file(volume, layout)
            target = _target_of(domain, f"ua-{volume.volume_id}")
            if not target:
                # It runs, and this disk is not plugged in: somebody else's lock on the file says whether it may be touched.
                return self._grow_file(volume, layout)
            if volumes.require_growth(volume, volumes.observe(volume.volume_id, layout)) != volume.size_bytes:
                domain.blockResize(target, volume.size_bytes, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
            return volumes.observe(volume.volume_id, layout)

    def grow_block(self, volume: VolumeSpec, pool: PoolSpec, vm_id: str) -> VolumeObservation:
        """As `grow_volume`, of a volume that is no file: it grows where it is, then the guest that has it is told."""
        secret = self._keys.of_pool(pool)
        seen = block_pools.grow_volume(volume, pool, secret)
        if not vm_id:
            return seen
        with (
            self._domains.locks.hold(check_id(vm_id, "vm_id")),
            self._connection.use(f"grow volume {volume.volume_id}", changes=True) as connection,
        ):
            domain = find(connection, vm_id)
            target = _target_of(domain, f"ua-{volume.volume_id}") if domain is not None and domain.isActive() else ""
            if target:
                domain.blockResize(target, volume.size_bytes, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
        return seen

    def _grow_file(self, volume: VolumeSpec, layout: PoolLayout) -> VolumeObservation:
        return volumes.grow(volume, layout, key=self._keys.of_volume(volume))

    def _apply_live(self, connection: Any, domain: Any, spec: DomainSpec) -> tuple[ChangeLeft, ...]:
        wanted = _devices(parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))
        left = _unplug(domain, wanted)
        require_volumes(spec)
        for network in domain_facts.read(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)).networks:
            self._networks.start(connection, network)
        self._plug(connection, domain, wanted)
        _limit_disks(domain, wanted)
        _fit_scheduling(domain, spec, cpu_shares=self._domains.cpu_shares)
        _fit_balloon(domain, spec)
        left += _change_medium(domain)
        left += _fit_memory(domain, spec)
        left += self._fit_vcpus(domain, spec, is_memory_settled=not any(each.part is ChangedPart.MEMORY for each in left))
        return tuple(left)

    def _plug(self, connection: Any, domain: Any, wanted: dict[str, Element]) -> None:
        root = parse(domain.XMLDesc(0))
        present = _devices(root)
        macs = {_mac_of(card) for card in root.findall("devices/interface")}
        for alias, element in wanted.items():
            # A card that somebody plugged in by hand and that was taken over has no name of ours until the next stop.
            is_there_unnamed = element.tag == "interface" and _mac_of(element) in macs
            if alias not in present and not is_there_unnamed:
                _require_slot(root, element)
                with self._keys.in_libvirt(connection, needed_by(element)):
                    domain.attachDeviceFlags(ElementTree.tostring(element, encoding="unicode"), _LIVE)

    def _fit_vcpus(self, domain: Any, spec: DomainSpec, *, is_memory_settled: bool) -> list[ChangeLeft]:
        run = (domain.UUIDString(), domain.ID())
        if domain.vcpusFlags(_LIVE) < spec.vcpus:
            self._given_vcpus.add(run)
        left = _fit_vcpus(domain, spec, is_memory_settled=is_memory_settled)
        live = domain.XMLDesc(0)
        is_given = run in self._given_vcpus
        # What somebody plugged in by hand and was taken over has told the guest as little as we have.
        is_found = _has_plugged_vcpus(parse(live)) and self._online_vcpus.get(spec.uuid) != (run[1], spec.vcpus)
        if left or not (is_given or is_found) or not domain_facts.read(live).has_guest_agent:
            return left
        # Some guests leave new vcpus offline until told. Without an agent there is nobody to tell, and nobody to ask.
        online = self._bring_online(spec)
        if online != spec.vcpus:
            return [_vcpus_left(f"the guest uses {online} of its {spec.vcpus} vcpus so far")] if is_given else []
        self._given_vcpus.discard(run)
        self._online_vcpus[spec.uuid] = run[1], spec.vcpus
        return []

    def _bring_online(self, spec: DomainSpec) -> int:
        """Have the guest's agent bring every vcpu online; return how many are, 0 where it does not answer in time."""
        online: list[int] = []

        def ask() -> None:
            try:
                # A connection of its own, since libvirt waits for a silent agent for longer than this verb may take.
                with self._connection.use("ask the guest's agent about its vcpus", changes=True) as connection:
                    domain = require(connection, spec.vm_id)
                    domain.setVcpusFlags(spec.vcpus, libvirt.VIR_DOMAIN_VCPU_GUEST)
                    online.append(len(_numbers(domain.guestVcpus()["online"])))
            except TrimtabError as error:
                log.info("guest agent did not answer about vcpus", vm_id=spec.vm_id, error=str(error))

        thread = threading.Thread(target=ask, name="ask-guest-agent", daemon=True)
        thread.start()
        thread.join(AGENT_WAIT_S)
        return online[0] if online else 0


# --- disks and cards -------------------------------------------------------------------------------------------------------


def _devices(root: Element) -> dict[str, Element]:
    """Return the disks and cards that may come and go, by alias."""
    found = {}
    for kind in _KINDS:
        for element in root.findall(f"devices/{kind}"):
            alias = element.find("alias")
            name = alias.get("name", "") if alias is not None else ""
            if name.startswith(_DEVICE_ALIASES):
                found[name] = element
    return found


def _target_of(domain: Any, alias: str) -> str:
    disk = _devices(parse(domain.XMLDesc(0))).get(alias)
    target = disk.find("target") if disk is not None else None
    return target.get("dev", "") if target is not None else ""


def _unplug(domain: Any, wanted: dict[str, Element]) -> list[ChangeLeft]:
    extra = {alias: element for alias, element in _devices(parse(domain.XMLDesc(0))).items() if alias not in wanted}
    for alias in extra:
        _ask_to_unplug(domain, alias)
    # The guest answers in its own time; only the definition without the device says that it is gone.
    kept = _wait(
        lambda: extra.keys() & _devices(parse(domain.XMLDesc(0))).keys(), until=lambda kept: not kept, timeout_s=DEVICE_WAIT_S
    )
    return [
        ChangeLeft(
            part=_KINDS[extra[alias].tag],
            device_id=alias.removeprefix("ua-"),
            reason="the guest was asked to let go of it and has not yet",
        )
        for alias in sorted(kept)
    ]


def _ask_to_unplug(domain: Any, alias: str) -> None:
    try:
        domain.detachDeviceAlias(alias, _LIVE)
    except libvirt.libvirtError as error:
        # Asked before: QEMU asks the guest once and refuses to ask twice in a row. Or gone this moment.
        is_asked = "in the process of unplug" in (error.get_error_message() or "")
        if not is_asked and error.get_error_code() != libvirt.VIR_ERR_DEVICE_MISSING:
            raise


def _mac_of(card: Element) -> str:
    mac = card.find("mac")
    return mac.get("address", "").lower() if mac is not None else ""


def _require_slot(root: Element, element: Element) -> None:
    """Raise Conflict where the guest was started without the port that the device needs, or it is taken."""
    address = element.find("address[@type='pci']")
    if address is None:
        return
    bus = int(address.get("bus", "0"), 16)
    has_port = any(int(each.get("index", "-1")) == bus for each in root.findall("devices/controller[@type='pci']"))
    is_taken = any(
        int(each.get("bus", "0"), 16) == bus
        for each in root.findall("devices/*/address[@type='pci']")
        if each.get("slot") == "0x00"
    )
    if not has_port or is_taken:
        raise Conflict(
            "no-free-slot",
            "the running guest has no free slot for this device; stop the vm, attach the device, and start it again",
            bus=bus,
        )


def _limit_disks(domain: Any, wanted: dict[str, Element]) -> None:
    """Give each disk the limits of the definition."""
    present = _devices(parse(domain.XMLDesc(0)))
    for alias, element in wanted.items():
        target = element.find("target")
        if element.tag == "disk" and alias in present and target is not None and _limits(element) != _limits(present[alias]):
            domain.setBlockIoTune(target.get("dev", ""), _limits(element), _LIVE)


def _limits(disk: Element) -> dict[str, int]:
    return {tag: int(disk.findtext(f"iotune/{tag}") or 0) for tag in ("total_bytes_sec", "total_iops_sec")}


# --- CD-ROM ----------------------------------------------------------------------------------------------------------------


def _change_medium(domain: Any) -> list[ChangeLeft]:
    """Give the running guest's drive the medium of the definition."""
    wanted, present = (_drive(parse(domain.XMLDesc(flags))) for flags in (libvirt.VIR_DOMAIN_XML_INACTIVE, 0))
    if _medium(wanted) == _medium(present):
        return []
    if wanted is None or present is None:
        return [_cdrom_left("the running guest's drive comes and goes with a stop only", needs_stop=True)]
    try:
        domain.updateDeviceFlags(ElementTree.tostring(wanted, encoding="unicode"), _LIVE)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_OPERATION_FAILED:
            raise
        return [_cdrom_left("the guest has locked the drive's tray; it was asked to open it")]
    return []


def _drive(root: Element) -> Element | None:
    """Return the drive whose medium changes; the one with drivers comes and goes with a stop."""
    drives = root.findall("devices/disk[@device='cdrom']")
    return next((drive for drive in drives if drive.find(f"alias[@name='{DRIVERS_ALIAS}']") is None), None)


def _medium(drive: Element | None) -> str | None:
    """Return the path of the drive's image, '' for an empty one, None for no drive."""
    source = drive.find("source") if drive is not None else None
    return None if drive is None else source.get("file", "") if source is not None else ""


def _cdrom_left(reason: str, *, needs_stop: bool = False) -> ChangeLeft:
    return ChangeLeft(part=ChangedPart.CDROM, reason=reason, needs_stop=needs_stop)


# --- what it gets of the host ------------------------------------------------------------------------------------------------


def _fit_scheduling(domain: Any, spec: DomainSpec, *, cpu_shares: int) -> None:
    """Give the running guest its share of the cpus; one of which nothing is said is not asked about at all."""
    wanted = resource_xml.scheduling_of(spec, cpu_shares=cpu_shares)
    is_plain = spec.resources is None or not (spec.resources.cpu_weight or spec.resources.cpu_limit_percent)
    live = parse(domain.XMLDesc(0))
    if is_plain and live.find("cputune/shares") is None and live.find("cputune/quota") is None:
        return
    present = domain.schedulerParametersFlags(_LIVE)
    changed = {name: value for name, value in wanted.items() if present.get(name) != value}
    if changed:
        domain.setSchedulerParametersFlags(changed, _LIVE)


def _fit_balloon(domain: Any, spec: DomainSpec) -> None:
    """Tell the running guest's balloon how far it may go; one that may not go at all gives everything back, whoever took it."""
    floor_mib = resource_xml.floor_of(spec)
    if resource_xml.read_floor(parse(domain.XMLDesc(0))) != floor_mib:
        text, prefix = (resource_xml.balloon_metadata(floor_mib), resource_xml.BALLOON_PREFIX) if floor_mib else (None, None)
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, prefix, resource_xml.BALLOON_NAMESPACE, _LIVE)
    live = domain.XMLDesc(0)
    facts, root = domain_facts.read(live), parse(live)
    if facts.squeezed_to_mib:
        # A balloon takes nothing of what is plugged in, and libvirt refuses a target that counts it.
        all_mib = facts.memory_mib if _memory_device(root) is None else _boot_memory_mib(root)
        domain.setMemoryFlags(all_mib << 10, _LIVE)


# --- memory ----------------------------------------------------------------------------------------------------------------


def _fit_memory(domain: Any, spec: DomainSpec) -> list[ChangeLeft]:
    root = parse(domain.XMLDesc(0))
    device = _memory_device(root)
    if device is None:
        has_mib = domain_facts.read(domain.XMLDesc(0)).memory_mib
        if has_mib == spec.memory_mib:
            return []
        return [_memory_left(f"the guest was started with {has_mib} MiB and no room to plug more in", needs_stop=True)]
    size_mib, boot_mib = _mib(device, "size"), _boot_memory_mib(root)
    asked_mib = -(-(spec.memory_mib - boot_mib) // MEMORY_STEP_MIB) * MEMORY_STEP_MIB
    request_mib = min(max(asked_mib, 0), size_mib)
    if _mib(device, "requested") != request_mib:
        requested = device.find("target/requested")
        assert requested is not None
        requested.set("unit", "MiB")
        requested.text = str(request_mib)
        domain.updateDeviceFlags(ElementTree.tostring(device, encoding="unicode"), _LIVE)
    plugged_mib = _wait(lambda: _plugged_mib(domain), until=lambda plugged: plugged == request_mib, timeout_s=MEMORY_WAIT_S)
    if asked_mib < 0:
        return [_memory_left(f"the guest was started with {boot_mib} MiB and cannot give of those", needs_stop=True)]
    if asked_mib > size_mib:
        return [_memory_left(f"the guest was started with room for {boot_mib + size_mib} MiB", needs_stop=True)]
    if plugged_mib != request_mib:
        verb = "taken" if plugged_mib < request_mib else "kept"
        return [_memory_left(f"the guest has {verb} {boot_mib + plugged_mib} of {spec.memory_mib} MiB so far")]
    return []


def _memory_left(reason: str, *, needs_stop: bool = False) -> ChangeLeft:
    return ChangeLeft(part=ChangedPart.MEMORY, reason=reason, needs_stop=needs_stop)


def _memory_device(root: Element) -> Element | None:
    for device in root.findall("devices/memory[@model='virtio-mem']"):
        alias = device.find("alias")
        if alias is not None and alias.get("name") == MEMORY_ALIAS:
            return device
    return None


def _boot_memory_mib(root: Element) -> int:
    cell = root.find("cpu/numa/cell")
    assert cell is not None, "a domain with a virtio-mem device has a NUMA cell"
    return domain_facts.kib(int(cell.get("memory", "0")), cell.get("unit", "KiB")) // 1024


def _plugged_mib(domain: Any) -> int:
    device = _memory_device(parse(domain.XMLDesc(0)))
    return _mib(device, "current") if device is not None else 0


def _mib(device: Element, name: str) -> int:
    element = device.find(f"target/{name}")
    return domain_facts.kib(int(element.text or 0), element.get("unit", "KiB")) // 1024 if element is not None else 0


# --- vcpus -----------------------------------------------------------------------------------------------------------------


def _fit_vcpus(domain: Any, spec: DomainSpec, *, is_memory_settled: bool) -> list[ChangeLeft]:
    has, most = domain.vcpusFlags(_LIVE), domain.maxVcpus()
    if has == spec.vcpus:
        return []
    if spec.vcpus > most:
        return [_vcpus_left(f"the guest was started with at most {most} vcpus", needs_stop=True)]
    if spec.vcpus < has and not is_memory_settled:
        return [_vcpus_left("vcpus are unplugged once the memory is settled")]
    if _is_one_gone(domain):
        return [_vcpu_gone(has)]
    try:
        domain.setVcpusFlags(spec.vcpus, _LIVE)
    except libvirt.libvirtError as error:
        refused = _vcpus_refused(error, has)
        return [_vcpu_gone(has) if _is_one_gone(domain) else refused]
    has = domain.vcpusFlags(_LIVE)
    return [] if has == spec.vcpus else [_vcpus_left(f"the guest has {has} of {spec.vcpus} vcpus so far")]


def _has_plugged_vcpus(live: Element) -> bool:
    """Tell whether the guest has a vcpu that it did not boot with: libvirt lets go of no other."""
    return live.find("vcpus/vcpu[@enabled='yes'][@hotpluggable='yes']") is not None


def _is_one_gone(domain: Any) -> bool:
    """Tell whether QEMU removed a vcpu and libvirt was not told.

    Measured on QEMU 7.2 under TCG: the guest lets go of it, DEVICE_DELETED names its APIC only, and libvirt 9.0 waits for the rest.
    From then on it asks after a thread that is no more, and a vcpu added in that state ends QEMU.
    """
    try:
        domain.vcpus()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR:
            return True
        raise
    return False


def _vcpu_gone(has: int) -> ChangeLeft:
    return _vcpus_left(f"the guest let go of a vcpu, and its QEMU never told libvirt, which counts {has}", needs_stop=True)


def _vcpus_refused(error: libvirt.libvirtError, has: int) -> ChangeLeft:
    match error.get_error_code():
        case libvirt.VIR_ERR_OPERATION_TIMEOUT | libvirt.VIR_ERR_OPERATION_FAILED:
            return _vcpus_left(f"the guest keeps {has} vcpus: it did not let go of one when asked")
        case libvirt.VIR_ERR_CONFIG_UNSUPPORTED | libvirt.VIR_ERR_OPERATION_UNSUPPORTED:
            return _vcpus_left("the vcpus that the guest was started with cannot be unplugged", needs_stop=True)
    if errors.is_gone(error):
        raise Conflict("guest-ended", "the guest ended while its vcpus were changed") from error
    raise error


def _numbers(ranges: str) -> set[int]:
    """Return the numbers of `0-2,5`."""
    found: set[int] = set()
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _vcpus_left(reason: str, *, needs_stop: bool = False) -> ChangeLeft:
    return ChangeLeft(part=ChangedPart.VCPUS, reason=reason, needs_stop=needs_stop)


def _wait(ask: Callable[[], T], *, until: Callable[[T], bool], timeout_s: float) -> T:
    """Return what `ask` says once it is as wanted, or what it says after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not until(answer := ask()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)  # the guest's own time; libvirt's event would still have to be matched with what is there
    return answer
