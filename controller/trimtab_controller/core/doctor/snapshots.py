"""Snapshots that are kept long: their layers grow with every write and slow the disk down. They are no backups."""

from datetime import timedelta

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity

NOTICE_AFTER = timedelta(days=7)
WARN_AFTER = timedelta(days=30)


def old(fleet: FleetFacts) -> tuple[Finding, ...]:
    found = []
    for one in fleet.snapshots:
        age = fleet.now - one.created_at
        if age < NOTICE_AFTER:
            continue
        beside = f", the oldest of {one.count}," if one.count > 1 else ""
        found.append(
            Finding(
                severity=Severity.WARNING if age >= WARN_AFTER else Severity.NOTICE,
                kind="snapshot-old",
                subject=f"vm {one.project}/{one.vm}",
                message=f"its snapshot {one.name}{beside} is {age.days} days old",
                cure=f"trimtab vm snapshot delete {one.vm} {one.name} --project {one.project}",
                since=one.created_at,
            )
        )
    return tuple(found)
