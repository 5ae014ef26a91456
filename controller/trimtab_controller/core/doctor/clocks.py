"""Clocks of hosts that are off: certificates that are not valid yet, guests with a wrong time, logs that cannot be put in order."""

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity

WARN_MS = 500
CRITICAL_MS = 2000
"""A host that is off by more is not let in when it joins."""


def skewed(fleet: FleetFacts) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            severity=Severity.CRITICAL if abs(host.skew_ms) > CRITICAL_MS else Severity.WARNING,
            kind="clock-skew",
            subject=f"host {host.name}",
            message=f"its clock is {abs(host.skew_ms) / 1000:.1f} s {'ahead of' if host.skew_ms > 0 else 'behind'} the controller's",
            cure=f"on {host.name}: timedatectl set-ntp true",
        )
        for host in fleet.hosts
        if abs(host.skew_ms) >= WARN_MS
    )
