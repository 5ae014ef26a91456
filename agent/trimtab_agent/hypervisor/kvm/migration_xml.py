"""Rewrites a running domain's definition for the host that receives it. Pure.

The guest must find the very same hardware there, so the live definition is kept as libvirt shows it, with every address, and only what
differs between hosts is replaced: file paths, bridges, our metadata.
"""

from collections.abc import Collection, Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm import domain_facts, numa_xml, resource_xml
from trimtab_agent.hypervisor.kvm.domain_xml import DRIVERS_TARGET, METADATA_NAMESPACE, iso_path, state_layout, target_name
from trimtab_agent.hypervisor.kvm.networks import bridge_of, libvirt_network_name
from trimtab_agent.hypervisor.kvm.packet_rules import tap_name
from trimtab_agent.hypervisor.kvm.pool_layout import SEED_FILE, PoolLayout
from trimtab_agent.hypervisor.kvm.xml_tree import parse
from trimtab_protos.errors import Conflict
from trimtab_protos.messages import DomainSpec, NetworkSpec, NicSpec

_CDROM = "cdrom"


def retarget(live_xml: str, target: DomainSpec, stamp: Stamp, *, cpu_shares: int = 1024) -> str:
    """Return the migratable definition `live_xml` as it shall be on the target. Conflict: it has a disk or card that the spec lacks.

    `cpu_shares`: see `HostTraits`.
    """
    root = parse(live_xml)
    adopted = domain_facts.read(live_xml).adopted_disks
    _stamp(root, stamp)
    numa_xml.place(root, target)
    if adopted is None:
        resource_xml.place(root, target, cpu_shares=cpu_shares)
    layouts = PoolLayout.of_files(target.pools)
    drives = {_CDROM: target.cdrom, DRIVERS_TARGET: target.drivers}
    paths = {name: iso_path(drive, layouts) for name, drive in drives.items() if drive is not None and drive.image_id}
    names = _names(target, adopted)
    paths |= {
        names[disk.volume_id]: layouts[disk.pool_id].volume(disk.volume_id, disk.format, disk.layer_id)
        for disk in target.disks
        if disk.pool_id in layouts
    }
    # What is in the network is the same from everywhere.
    unmoved = {names[disk.volume_id] for disk in target.disks if disk.pool_id not in layouts}
    for disk in root.findall("devices/disk"):
        _move_disk(disk, paths, target, unmoved)
    nvram = root.find("os/nvram")
    if nvram is not None:
        if adopted is not None:
            raise Conflict("adopted-definition", "its UEFI variables move with its next stop; stop and start it first")
        nvram.text = state_layout(target).nvram(target.vm_id)
    cards = {nic.mac: nic for nic in target.nics}
    for card in root.findall("devices/interface"):
        _move_card(card, cards, target)
    return ElementTree.tostring(root, encoding="unicode")


def disk_targets(target: DomainSpec, volume_ids: frozenset[str], *, adopted: Mapping[str, str] | None = None) -> list[str]:
    """Return libvirt's names of the disks whose volumes are to be copied; `adopted`: volume ids by the names of an adopted domain."""
    names = _names(target, adopted)
    return [names[disk.volume_id] for disk in target.disks if disk.volume_id in volume_ids]


def _names(target: DomainSpec, adopted: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return what libvirt calls each volume's disk: an adopted domain has names of its own."""
    own = {volume_id: name for name, volume_id in (adopted or {}).items()}
    return {disk.volume_id: own.get(disk.volume_id, target_name(disk)) for disk in target.disks}


def _stamp(root: Element, stamp: Stamp) -> None:
    element = root.find(f"metadata/{{{METADATA_NAMESPACE}}}domain/{{{METADATA_NAMESPACE}}}stamp")
    if element is None:
        raise Conflict("domain-unmanaged", "the domain carries no metadata of Trimtab")
    element.set("epoch", str(stamp.epoch))
    element.set("turn", str(stamp.turn))
    # The target marks its own boot when it settles.
    element.set("boot", "")


def _move_disk(disk: Element, paths: dict[str, str], target: DomainSpec, unmoved: Collection[str]) -> None:
    source, device = disk.find("source"), disk.find("target")
    if source is None or device is None:
        return
    is_install_drive = disk.get("device") == "cdrom" and (target.drivers is None or device.get("dev") != DRIVERS_TARGET)
    name = _CDROM if is_install_drive else device.get("dev", "")
    # The target finds the chain by its own copy of the image; the one listed here has this host's paths.
    for chain in disk.findall("backingStore"):
        disk.remove(chain)
    if name in unmoved:
        return
    if name in paths:
        source.set("file", paths[name])
    elif source.get("file", "").endswith(f"/{SEED_FILE}"):
        source.set("file", state_layout(target).seed(target.vm_id))
    else:
        raise Conflict("disk-unknown", f"the running domain has a disk {name} that the vm does not have")


def _move_card(card: Element, cards: dict[str, NicSpec], target: DomainSpec) -> None:
    mac, source = card.find("mac"), card.find("source")
    nic = cards.get(mac.get("address", "")) if mac is not None else None
    if nic is None or source is None:
        raise Conflict("nic-unknown", "the running domain has a network card that the vm does not have")
    network = _network_of(nic.network_id, target)
    port = card.find("target")
    # A guest that an earlier release started has a port with a name of libvirt's, which no rules are made for.
    (port if port is not None else SubElement(card, "target")).set("dev", tap_name(nic.nic_id))
    if bridge := bridge_of(network, nic.nic_id):
        card.set("type", "bridge")
        source.attrib = {"bridge": bridge}
    else:
        card.set("type", "network")
        source.attrib = {"network": libvirt_network_name(network.network_id)}


def _network_of(network_id: str, target: DomainSpec) -> NetworkSpec:
    for network in target.networks:
        if network.network_id == network_id:
            return network
    raise Conflict("network-missing", f"the target's spec does not describe network {network_id}")
