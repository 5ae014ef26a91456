"""PCI devices of the host in a guest's definition. Pure."""

import re
from xml.etree.ElementTree import Element, SubElement

from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DomainSpec

_ADDRESS = re.compile(r"([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_PARTS = ("domain", "bus", "slot", "function")


def check(domain: DomainSpec) -> None:
    """InvalidRequest for an address that is none, or given twice."""
    for address in domain.host_devices:
        if not _ADDRESS.fullmatch(address):
            raise InvalidRequest(
                "device-wrong",
                f"host_devices: {address[:40]!r} is no PCI address; for example 0000:41:00.0",
                field="host_devices",
            )
    if len(set(domain.host_devices)) != len(domain.host_devices):
        raise InvalidRequest("device-twice", "host_devices: a device is named twice", field="host_devices")


def give(devices: Element, domain: DomainSpec) -> None:
    """Add each device; libvirt puts it behind one of the spare ports."""
    for address in domain.host_devices:
        found = _ADDRESS.fullmatch(address)
        assert found is not None, "checked before"
        device = SubElement(devices, "hostdev", mode="subsystem", type="pci", managed="yes")
        place = {part: f"0x{text}" for part, text in zip(_PARTS, found.groups(), strict=True)}
        SubElement(SubElement(device, "source"), "address", place)
