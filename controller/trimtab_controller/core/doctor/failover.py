"""Failover that stands still: while it does, the vms of a dead host stay down."""

from dataclasses import replace

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity


def standing_still(fleet: FleetFacts) -> tuple[Finding, ...]:
    found = []
    if fleet.database_behind:
        behind = _finding("database-behind", fleet.database_behind, "trimtab-controller recover", subject="database")
        found.append(replace(behind, since=fleet.database_behind_since))
    if fleet.is_failover_paused:
        words = "is paused by an operator: nothing is fenced or restarted elsewhere"
        found.append(_finding("failover-paused", words, "trimtab failover resume"))
    if fleet.failover_frozen:
        words = f"stands still by itself: {fleet.failover_frozen}"
        found.append(_finding("failover-frozen", words, "trimtab failover status"))
    return tuple(found)


def _finding(kind: str, words: str, cure: str, *, subject: str = "failover") -> Finding:
    return Finding(severity=Severity.CRITICAL, kind=kind, subject=subject, message=words, cure=cure)
