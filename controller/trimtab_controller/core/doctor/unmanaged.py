"""Memory that domains take which are not ours: beyond the reserve, it is taken from vms, or the kernel kills one."""

from collections.abc import Iterator

from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity

KINDS = ("memory-oversold", "unmanaged-memory")


def check(facts: FleetFacts) -> Iterator[Finding]:
    for host in facts.hosts:
        host_class = facts.classes.get(host.host_class_id)
        if host.inventory is None or host_class is None or host.unmanaged_memory_mib <= host_class.memory_reserve_mib:
            continue
        used_mib, has_mib = host.memory_claimed_mib + host.unmanaged_memory_mib, host.inventory.memory_mib
        reserve = f"more than the reserve of {host_class.memory_reserve_mib} MiB"
        what = f"domains that are not ours have {host.unmanaged_memory_mib} MiB, {reserve}"
        is_oversold = used_mib > has_mib
        if is_oversold:
            what += f"; with its vms' {host.memory_claimed_mib} MiB that is more than the {has_mib} MiB it has"
        yield Finding(
            severity=Severity.SEVERE if is_oversold else Severity.WARNING,
            kind="memory-oversold" if is_oversold else "unmanaged-memory",
            subject=f"host {host.name}",
            what=what,
            cure=f"trimtab host drain {host.name} --plan" if is_oversold else f"trimtab host get {host.name}",
        )
