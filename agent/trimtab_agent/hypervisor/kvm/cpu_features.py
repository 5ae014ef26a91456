"""CPU features as definitions have them and as our lists do, and which of them guests of this host can have.

In a list a name alone is required, `-vmx` is disabled and `?vmx` optional. What somebody else's definition has besides is said as `!vmx`
(forbid) and `+vmx` (force); ours never has these.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm.identifiers import check_cpu_word
from trimtab_agent.hypervisor.kvm.xml_tree import parse

log = structlog.get_logger(__name__)

_SIGNS = {"disable": "-", "optional": "?", "forbid": "!", "force": "+"}
_OURS = {"-": "disable", "?": "optional"}
# Another question may be answered; of everything else libvirt cannot say it in full, and still runs guests.
_NOBODY_ANSWERS = frozenset(
    {libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_ERR_NO_CONNECT}
)


def described(cpu: Element | None) -> tuple[str, ...]:
    """Return the features that the definition names, each with the sign of its policy."""
    found = cpu.findall("feature") if cpu is not None else ()
    return tuple(_SIGNS.get(feature.get("policy", ""), "") + feature.get("name", "") for feature in found)


def write(cpu: Element, features: Iterable[str]) -> None:
    """Write a vm's features into the definition."""
    for feature in features:
        policy = _OURS.get(feature[:1], "")
        name = feature[1:] if policy else feature
        SubElement(cpu, "feature", policy=policy or "require", name=check_cpu_word(name, "cpu_features"))


@dataclass(frozen=True, slots=True)
class HostFeatures:
    names: tuple[str, ...]
    are_all: bool
    """False: only what the host has beyond its base model."""


class HostFeaturesReader:
    """Asks libvirt what its name for the host's CPU implies. Thread-safe.

    Domain capabilities name a model and what the host has or lacks beside it; a guest that requires what the model implies runs here.
    The answer follows from these and libvirt's own list of models, so it is asked for once: it can take seconds.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[str, str, int], HostFeatures] | None = None

    def read(self, connection: Any, offered: Element, *, machine: str, domain_type: str) -> HostFeatures:
        mode = offered.find("cpu/mode[@name='host-model'][model]")
        if mode is None:
            return HostFeatures((), are_all=False)
        cpu = Element("cpu")
        cpu.extend(mode)
        text = ElementTree.tostring(cpu, encoding="unicode")
        key = (text, domain_type, connection.getLibVersion())
        known = self._known
        if known is None or known[0] != key:
            known = self._known = (key, _expanded(connection, text, machine=machine, domain_type=domain_type))
        return known[1]


def _expanded(connection: Any, cpu: str, *, machine: str, domain_type: str) -> HostFeatures:
    flags = libvirt.VIR_CONNECT_BASELINE_CPU_EXPAND_FEATURES
    try:
        whole = connection.baselineHypervisorCPU(None, "x86_64", machine, domain_type, [cpu], flags)
    except libvirt.libvirtError as error:
        if error.get_error_code() in _NOBODY_ANSWERS:
            raise
        log.warning("libvirt does not say all that guests of this host can have", error=str(error))
        return HostFeatures(_required(cpu), are_all=False)
    return HostFeatures(_required(whole), are_all=True)


def _required(cpu: str) -> tuple[str, ...]:
    return tuple(sorted(feature.get("name", "") for feature in parse(cpu).findall("feature[@policy='require']")))
