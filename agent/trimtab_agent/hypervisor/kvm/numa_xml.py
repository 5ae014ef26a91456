"""Where on its host a guest's memory and vcpus come from: huge pages, NUMA cells, cpus set aside. Pure."""

import re
from xml.etree.ElementTree import Element, SubElement

from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DomainSpec

_CPUSET = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*")
_CELL_MAX = 1023


def check(domain: DomainSpec) -> None:
    """InvalidRequest names the field that libvirt could not be told."""
    if domain.cpuset and not _CPUSET.fullmatch(domain.cpuset):
        raise InvalidRequest("cpuset-wrong", f"cpuset {domain.cpuset[:40]!r}: for example 4-7,12", field="cpuset")
    if any(not 0 <= cell <= _CELL_MAX for cell in domain.numa_cells):
        raise InvalidRequest("cell-wrong", f"numa_cells: from 0 to {_CELL_MAX}", field="numa_cells")
    if domain.page_kib and (domain.page_kib < 0 or domain.memory_mib * 1024 % domain.page_kib):
        raise InvalidRequest(
            "pages-uneven", f"page_kib {domain.page_kib}: {domain.memory_mib} MiB are no whole number of pages", field="page_kib"
        )


def place(root: Element, domain: DomainSpec) -> None:
    """Write it into a definition, in place of what stands there: another host has other cells and cpus."""
    vcpu = root.find("vcpu")
    assert vcpu is not None, "every domain has vcpus"
    vcpu.attrib.pop("cpuset", None)
    if domain.cpuset:
        vcpu.set("cpuset", domain.cpuset)
    for tag in ("memoryBacking", "numatune"):
        for old in root.findall(tag):
            root.remove(old)
    if domain.page_kib:
        pages = SubElement(SubElement(root, "memoryBacking"), "hugepages")
        SubElement(pages, "page", size=str(domain.page_kib), unit="KiB")
    if domain.numa_cells:
        # Strict: the pages were counted in these cells, and no others are kept for the guest.
        nodes = ",".join(str(cell) for cell in sorted(set(domain.numa_cells)))
        SubElement(SubElement(root, "numatune"), "memory", mode="strict", nodeset=nodes)
