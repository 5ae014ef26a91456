"""Vms that the rest of the fleet could not restart if a host, rack or zone were lost: what the failover proof says."""

from collections.abc import Iterator

from trimtab_controller.core.doctor.facts import FleetFacts, some
from trimtab_controller.core.doctor.finding import Finding, Severity

KINDS = ("not-covered",)


def check(facts: FleetFacts) -> Iterator[Finding]:
    """A host that is lost is an everyday matter; a rack or a zone is more than some fleets are meant to survive."""
    for one in facts.uncovered:
        names = [facts.vm_by_id[vm_id].label for vm_id in one.vm_ids if vm_id in facts.vm_by_id]
        if names:
            flag = "host" if one.kind == "host" else f"{one.kind}={one.value}"
            yield Finding(
                severity=Severity.SEVERE if one.kind == "host" else Severity.WARNING,
                kind="not-covered",
                subject=f"{one.kind} {one.value}",
                what=f"if it is lost, {len(names)} vms cannot be restarted elsewhere: {some(names)}",
                cure="trimtab failover check" + (" --by host" if flag == "host" else f" -l {flag}"),
            )
