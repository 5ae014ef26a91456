"""Clocks of hosts that are off: certificates that are not valid yet, guests with a wrong time, logs that cannot be put in order."""

from collections.abc import Iterator

from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity

KINDS = ("clock-skew",)
WARN_MS = 500
# A host that is off by more is not let in when it joins.
SEVERE_MS = 2000


def check(facts: FleetFacts) -> Iterator[Finding]:
    for host_id, skew_ms in facts.skews_ms.items():
        host = facts.host_by_id.get(host_id)
        if host is None or abs(skew_ms) < WARN_MS:
            continue
        yield Finding(
            severity=Severity.SEVERE if abs(skew_ms) > SEVERE_MS else Severity.WARNING,
            kind="clock-skew",
            subject=f"host {host.name}",
            what=f"its clock is {abs(skew_ms) / 1000:.1f} s {'ahead of' if skew_ms > 0 else 'behind'} the controller's",
            cure=f"on {host.name}: timedatectl set-ntp true; timedatectl timesync-status",
        )
