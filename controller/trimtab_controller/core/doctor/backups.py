"""Vms that would lose more than their policy allows: what nobody notices until the day on which it counts."""

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity


def overdue(fleet: FleetFacts) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            severity=Severity.CRITICAL if one.is_lost else Severity.WARNING,
            kind="backup-missing" if one.is_lost else "backup-overdue",
            subject=f"vm {one.project}/{one.vm}",
            message=f"{one.problem} (policy {one.policy})",
            cure=f"trimtab backup run {one.vm} --project {one.project}",
            since=one.since,
        )
        for one in fleet.overdue_backups
    )
