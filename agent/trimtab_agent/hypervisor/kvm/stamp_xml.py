"""The metadata that makes a domain ours. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from trimtab_agent.hypervisor.base import Stamp
from trimtab_agent.hypervisor.kvm.identifiers import check_id, check_name, check_uuid


@dataclass(frozen=True, slots=True)
class AdoptedMark:
    """That a domain keeps the definition it was adopted with."""

    uuid: str
    disks: Mapping[str, str]
    """Volume ids by target."""


def stamp_metadata(
    vm_id: str,
    *,
    name: str,
    project: str,
    stamp: Stamp,
    boot_id: str,
    restarts_elsewhere: bool,
    adopted: AdoptedMark | None = None,
) -> str:
    """Return the metadata element for libvirt's `setMetadata`, which puts the namespace onto it by itself."""
    element = Element("domain")
    SubElement(
        element,
        "vm",
        id=check_id(vm_id, "vm_id"),
        name=check_name(name, "name"),
        project=check_name(project, "project"),
    )
    if restarts_elsewhere:
        # Read back by an agent that starts: the warden kills these, and no others, when the host's lease has ended.
        SubElement(element, "loss", restarts="elsewhere")
    if adopted is not None:
        mark = SubElement(element, "adopted", uuid=check_uuid(adopted.uuid))
        for target, volume_id in adopted.disks.items():
            SubElement(mark, "disk", target=target, volume=check_id(volume_id, "volume_id"))
    SubElement(element, "stamp", epoch=str(stamp.epoch), turn=str(stamp.turn), boot=boot_id)
    return ElementTree.tostring(element, encoding="unicode")
