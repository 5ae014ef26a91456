"""How a guest competes for its host's cpus, and how far its balloon may go. Pure.

The floor of the balloon stands in metadata of its own: the agent reads it back at every round and after every restart, a migration
carries it, and the stamp, which is written anew with each command, does not touch it.
"""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from trimtab_agent.hypervisor.kvm.identifiers import check_range
from trimtab_protos.device_messages import GuestResources
from trimtab_protos.errors import InvalidRequest
from trimtab_protos.messages import DomainSpec

BALLOON_NAMESPACE = "urn:trimtab:balloon:1"
BALLOON_PREFIX = "trimtab-balloon"
PERIOD_US = 100_000
"""Of the quota of cpu time: the kernel's own."""
NO_QUOTA = -1
WEIGHT_MAX = 1000
LIMIT_MIN_PERCENT, LIMIT_MAX_PERCENT = 5, 100
_WHOLE = 100
_SHARES_MIN = 2

ElementTree.register_namespace(BALLOON_PREFIX, BALLOON_NAMESPACE)


def check(domain: DomainSpec) -> None:
    """InvalidRequest names the field that cannot be."""
    resources = domain.resources or GuestResources()
    check_range(resources.balloon_min_mib, "resources.balloon_min_mib", low=0, high=domain.memory_mib)
    if resources.cpu_weight:
        check_range(resources.cpu_weight, "resources.cpu_weight", low=1, high=WEIGHT_MAX)
    if resources.cpu_limit_percent:
        check_range(resources.cpu_limit_percent, "resources.cpu_limit_percent", low=LIMIT_MIN_PERCENT, high=LIMIT_MAX_PERCENT)
    if resources.balloon_min_mib and (domain.memory_max_mib > domain.memory_mib or domain.page_kib or domain.host_devices):
        # Plugged memory and a balloon count against each other; huge pages and devices of the host hold every page for good.
        raise InvalidRequest(
            "balloon-impossible",
            "resources.balloon_min_mib: a guest with memory to be plugged, huge pages or a device of the host has no balloon",
            field="resources.balloon_min_mib",
        )


def floor_of(domain: DomainSpec) -> int:
    """Return what the balloon leaves the guest at least, in MiB; 0 where it must not be used."""
    return domain.resources.balloon_min_mib if domain.resources else 0


def place(root: Element, domain: DomainSpec, *, cpu_shares: int) -> None:
    """Write it into a definition, in place of what stands there: another host may have other classes."""
    for old in root.findall("cputune"):
        for tag in ("shares", "period", "quota"):
            for element in old.findall(tag):
                old.remove(element)
        if not len(old):
            root.remove(old)
    wanted = scheduling_of(domain, cpu_shares=cpu_shares)
    if domain.resources and (domain.resources.cpu_weight or domain.resources.cpu_limit_percent):
        tune = root.find("cputune")
        tune = tune if tune is not None else SubElement(root, "cputune")
        if domain.resources.cpu_weight:
            SubElement(tune, "shares").text = str(wanted["cpu_shares"])
        if domain.resources.cpu_limit_percent:
            SubElement(tune, "period").text = str(PERIOD_US)
            SubElement(tune, "quota").text = str(wanted["vcpu_quota"])
    metadata = root.find("metadata")
    assert metadata is not None, "every domain of ours has metadata"
    for element in metadata.findall(f"{{{BALLOON_NAMESPACE}}}balloon"):
        metadata.remove(element)
    if floor_of(domain):
        SubElement(metadata, f"{{{BALLOON_NAMESPACE}}}balloon", min_mib=str(floor_of(domain)))


def scheduling_of(domain: DomainSpec, *, cpu_shares: int) -> dict[str, int]:
    """Return libvirt's scheduler parameters of a guest that runs."""
    resources = domain.resources or GuestResources()
    quota = PERIOD_US * resources.cpu_limit_percent // _WHOLE if resources.cpu_limit_percent else NO_QUOTA
    shares = max(_SHARES_MIN, cpu_shares * (resources.cpu_weight or _WHOLE) // _WHOLE)
    return {"cpu_shares": shares, "vcpu_period": PERIOD_US, "vcpu_quota": quota}


def balloon_metadata(floor_mib: int) -> str:
    """Return the element for libvirt's `setMetadata`, which puts the namespace onto it by itself."""
    return ElementTree.tostring(Element("balloon", min_mib=str(floor_mib)), encoding="unicode")


def read_floor(root: Element) -> int:
    """Return the floor that a definition says; 0 for none."""
    element = root.find(f"metadata/{{{BALLOON_NAMESPACE}}}balloon")
    text = element.get("min_mib", "") if element is not None else ""
    return int(text) if text.isdigit() else 0
