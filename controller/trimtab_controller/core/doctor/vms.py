"""Vms that are not as they are wished to be, and those that failover gave up."""

from collections.abc import Iterator

from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity

KINDS = ("vm-given-up", "vm-problem")


def check(facts: FleetFacts) -> Iterator[Finding]:
    for vm in facts.vms:
        if vm.attention:
            yield Finding(
                severity=Severity.SEVERE,
                kind="vm-given-up",
                subject=f"vm {vm.label}",
                what=f"{vm.attention} gave it up: {vm.problem or 'no reason is known'}",
                cure=f"trimtab vm start {vm.name} -p {vm.project}",
            )
        elif vm.problem:
            yield Finding(
                severity=Severity.WARNING,
                kind="vm-problem",
                subject=f"vm {vm.label}",
                what=vm.problem,
                cure=f"trimtab vm get {vm.name} -p {vm.project}",
            )
