"""Snapshots that are kept long: their layers grow with every write and slow the disk down. They are no backups."""

from collections.abc import Iterator
from datetime import timedelta

from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity

KINDS = ("snapshot-old",)
NOTICE_AFTER = timedelta(days=7)
WARN_AFTER = timedelta(days=30)


def check(facts: FleetFacts) -> Iterator[Finding]:
    for one in facts.snapshots:
        vm, age = facts.vm_by_id.get(one.vm_id), facts.now - one.created_at
        if vm is None or age < NOTICE_AFTER:
            continue
        beside = f", the oldest of {one.count}" if one.count > 1 else ""
        yield Finding(
            severity=Severity.WARNING if age >= WARN_AFTER else Severity.NOTICE,
            kind="snapshot-old",
            subject=f"vm {vm.label}",
            what=f"its snapshot {one.name}{beside} is {age.days} days old",
            cure=f"trimtab vm snapshot delete {vm.name} {one.name} -p {vm.project}",
            since=one.created_at,
        )
