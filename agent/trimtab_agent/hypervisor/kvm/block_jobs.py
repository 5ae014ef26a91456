"""What QEMU has open of a running guest's disks, and the work that it does on them beside the guest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element

import libvirt

from trimtab_agent.hypervisor.kvm.xml_tree import parse


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk of a running domain, by libvirt's name, with the files that QEMU has open: what it writes to comes first."""

    target: str
    chain: tuple[str, ...]
    mirror: str = ""
    """The file that QEMU keeps equal to it, or is making so."""


def disks_of(domain: Any) -> Mapping[str, Disk]:
    """Return the running domain's disks by alias."""
    found = {}
    for element in parse(domain.XMLDesc(0)).findall("devices/disk"):
        alias, target = element.find("alias"), element.find("target")
        if alias is not None and target is not None:
            mirror = element.find("mirror/source")
            copy = mirror.get("file", "") if mirror is not None else ""
            found[alias.get("name", "")] = Disk(target.get("dev", ""), tuple(_chain(element)), copy)
    return found


def _chain(disk: Element) -> Iterator[str]:
    element: Element | None = disk
    while element is not None:
        source = element.find("source")
        if source is None:
            return
        yield source.get("file", "")
        element = element.find("backingStore")


def job_of(domain: Any, target: str) -> Mapping[str, Any]:
    """Return how far the work on a disk has come; empty where there is none."""
    found = domain.blockJobInfo(target, 0)
    return found if isinstance(found, dict) else {}


def job_unless_ended(domain: Any, target: str) -> Mapping[str, Any]:
    """As `job_of`, for a guest that may end meanwhile."""
    try:
        return job_of(domain, target)
    except libvirt.libvirtError:
        if domain.isActive():
            raise
        return {}  # the guest ended, and the job with it


def is_ready(domain: Any, target: str) -> bool:
    """Tell whether QEMU keeps both files equal; the numbers of the job are equal for an instant before that already."""
    for disk in parse(domain.XMLDesc(0)).findall("devices/disk"):
        name, mirror = disk.find("target"), disk.find("mirror")
        if name is not None and name.get("dev") == target:
            return mirror is not None and mirror.get("ready") == "yes"
    return False


def run_on(domain: Any) -> None:
    """Let the guest run that was held still, perhaps by an agent that was killed."""
    state, reason = domain.state()
    if state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_USER:
        domain.resume()
