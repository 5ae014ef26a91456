"""Power devices that nobody tried, or that did not answer: found out before the outage."""

from datetime import timedelta

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity

OLD = timedelta(days=7)


def untested(fleet: FleetFacts) -> tuple[Finding, ...]:
    found = []
    for host in fleet.hosts:
        for fence in host.fences:
            if fence.tested_at is None:
                severity, words = Severity.WARNING, "was never tested"
            elif not fence.is_ready:
                severity, words = (
                    Severity.CRITICAL,
                    f"could not be relied on at its last test: {fence.test_message or 'no word why'}",
                )
            elif fleet.now - fence.tested_at > OLD:
                severity, words = Severity.NOTICE, f"was last tested on {fence.tested_at:%Y-%m-%d}"
            else:
                continue
            subject = f"host {host.name}"
            message = f"its power device {fence.name} {words}"
            cure = f"trimtab fence test {host.name}"
            found.append(
                Finding(
                    severity=severity, kind="fence-untested", subject=subject, message=message, cure=cure, since=fence.tested_at
                )
            )
    return tuple(found)
