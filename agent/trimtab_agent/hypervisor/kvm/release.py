"""Makes Trimtab's domains plain libvirt domains when their host leaves the fleet for good.

Our mark is taken off, so that a later fleet counts them as what they are then: somebody's guests, shown, counted as used, never
touched. The pools that we defined are forgotten (their files stay): libvirt refuses a second pool on the same directory, which
would keep the host from joining another fleet. NAT networks stay, since guests may be on them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import libvirt
import structlog

from trimtab_agent.hypervisor.kvm import domain_facts, errors
from trimtab_agent.hypervisor.kvm.domain_xml import METADATA_NAMESPACE, METADATA_PREFIX
from trimtab_agent.hypervisor.kvm.firewall import forget_all
from trimtab_agent.hypervisor.kvm.identifiers import DOMAIN_PREFIX
from trimtab_protos.errors import TrimtabError

log = structlog.get_logger(__name__)


def release(uri: str = "qemu:///system", runtime_dir: Path = Path("/run/trimtab")) -> Sequence[str]:
    """Release every domain and pool of ours; return what was done, for people. Idempotent.

    Where libvirt does not answer nothing is done and the host leaves all the same.
    """
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        log.warning("domains keep Trimtab's mark", error=error.get_error_message())
        return (f"libvirt does not answer, so domains keep Trimtab's mark: {error.get_error_message()}",)
    try:
        released = [name for name in (_release(domain) for domain in connection.listAllDomains()) if name]
        forgotten = [name for name in (_forget(pool) for pool in connection.listAllStoragePools()) if name]
    finally:
        connection.close()
    lines = [f"{name} is a plain libvirt domain now" for name in sorted(released)]
    lines += _open_packets(runtime_dir)
    return [*lines, *(f"libvirt's pool {name} forgotten, its files stay" for name in sorted(forgotten))]


def _open_packets(runtime_dir: Path) -> list[str]:
    """Take the rules of guests' packets off: nobody would change them any more."""
    try:
        return (
            ["nftables' table trimtab removed: guests' packets pass as they are"] if forget_all(runtime_dir / "firewall") else []
        )
    except TrimtabError as error:
        log.warning("packet rules stay", error=error.message)
        return [f"nftables' table bridge trimtab could not be removed: {error.message}"]


def _release(domain: Any) -> str:
    """Take our metadata off, running and stored; return the domain's name, or "" where it was not ours."""
    try:
        if not domain_facts.read(domain.XMLDesc(0)).vm_id:
            return ""
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG if domain.isPersistent() else 0
        flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE if domain.isActive() else 0
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, None, METADATA_PREFIX, METADATA_NAMESPACE, flags)
    except libvirt.libvirtError as error:
        if errors.is_gone(error):
            return ""
        log.warning("domain keeps Trimtab's mark", domain=domain.name(), error=error.get_error_message())
        return ""
    return str(domain.name())


def _forget(pool: Any) -> str:
    name = str(pool.name())
    if not name.startswith(DOMAIN_PREFIX):
        return ""
    try:
        if pool.isActive():
            pool.destroy()
        pool.undefine()
    except libvirt.libvirtError as error:
        log.warning("libvirt's pool not forgotten", pool=name, error=error.get_error_message())
        return ""
    return name
