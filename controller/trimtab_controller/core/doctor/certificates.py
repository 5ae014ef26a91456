"""Certificates of hosts: agents renew them by themselves long before, so one that is near its end says that renewal fails."""

from datetime import timedelta

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity

NEAR = timedelta(hours=8)


def expiring(fleet: FleetFacts) -> tuple[Finding, ...]:
    found = []
    for host in fleet.hosts:
        for certificate in host.certificates:
            left = certificate.not_after - fleet.now
            if left > NEAR:
                continue
            is_over = left <= timedelta(0)
            at = f"{certificate.not_after:%Y-%m-%d %H:%M} UTC"
            found.append(
                Finding(
                    severity=Severity.CRITICAL if is_over else Severity.WARNING,
                    kind="certificate-expired" if is_over else "certificate-expiring",
                    subject=f"host {host.name}",
                    message=f"its {certificate.purpose} certificate {'ended' if is_over else 'ends'} at {at} and was not renewed",
                    cure=f"trimtab host token create {host.name} --rejoin" if is_over else f"trimtab host get {host.name}",
                    since=certificate.not_after if is_over else None,
                )
            )
    return tuple(found)
