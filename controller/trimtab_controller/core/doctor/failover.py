"""Failover that stands still: while it does, the vms of a dead host stay down."""

from collections.abc import Iterator

from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity

KINDS = ("failover-frozen", "failover-paused")


def check(facts: FleetFacts) -> Iterator[Finding]:
    if facts.control.is_paused:
        yield Finding(
            severity=Severity.SEVERE,
            kind="failover-paused",
            subject="failover",
            what="it is paused by an operator: nothing is fenced or restarted elsewhere",
            cure="trimtab failover resume",
        )
    if facts.control.frozen:
        yield Finding(
            severity=Severity.SEVERE,
            kind="failover-frozen",
            subject="failover",
            what=f"it stands still by itself: {facts.control.frozen}",
            cure="trimtab failover status",
        )
