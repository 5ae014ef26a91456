"""What lies behind a domain's disks, read from its definition: a file, a device, or something in the network. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from trimtab_agent.hypervisor.kvm import block_pools, volume_keys
from trimtab_agent.hypervisor.kvm.block_pools import Portal
from trimtab_agent.hypervisor.kvm.xml_tree import parse

QCOW2 = "qcow2"


@dataclass(frozen=True, slots=True)
class DiskSource:
    format: str
    path: str = ""
    """Of a file or a device; "" for what is in the network."""
    options: str = ""
    """How QEMU's tools open what is in the network; "" for the others."""
    secret_uuid: str = ""
    """Of the secret that opens it, "" for none."""
    is_ceph: bool = False
    is_file: bool = True
    alias: str = ""
    """As the guest's device is called: ua-<volume_id> for a disk of ours."""

    @property
    def keeps_bitmaps(self) -> bool:
        """Tell whether what changed on it since a checkpoint outlives its QEMU."""
        return self.format == QCOW2


def sources_of(domain_xml: str) -> Mapping[str, DiskSource]:
    """Return target → source of every disk that a guest may write; CD-ROMs and the seed are not among them."""
    found = {}
    for disk in parse(domain_xml).findall("devices/disk[@device='disk']"):
        source, target = disk.find("source"), disk.find("target")
        if source is None or target is None or disk.find("readonly") is not None:
            continue
        found[target.get("dev", "")] = _source_of(disk, source)
    return found


def _source_of(disk: Element, source: Element) -> DiskSource:
    driver, alias = disk.find("driver"), disk.find("alias")
    format = driver.get("type", "raw") if driver is not None else "raw"
    name = alias.get("name", "") if alias is not None else ""
    if disk.get("type") != "network":
        path = source.get("file") or source.get("dev") or ""
        return DiskSource(format, path, is_file=bool(source.get("file")), alias=name)
    secret = next((need.uuid for need in volume_keys.needed_by(disk)), "")
    is_ceph = source.get("protocol") == "rbd"
    options = _options_of(disk, source) if source.get("protocol") in {"iscsi", "rbd"} else ""
    return DiskSource(format, options=options, secret_uuid=secret, is_ceph=is_ceph, is_file=False, alias=name)


def _options_of(disk: Element, source: Element) -> str:
    portals = [Portal(host.get("name", ""), int(host.get("port", "0"))) for host in source.findall("host")]
    auth = next((one for one in (source.find("auth"), disk.find("auth")) if one is not None), None)
    user = auth.get("username", "") if auth is not None else ""
    place, _, name = source.get("name", "").rpartition("/")
    if source.get("protocol") == "rbd":
        return block_pools.rbd_options(portals, place, name, user)
    return block_pools.iscsi_options(portals[0], place, int(name), user)
