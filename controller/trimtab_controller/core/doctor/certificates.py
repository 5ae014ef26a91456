"""Certificates of hosts that are not renewed: a host whose agent's one lapses is no longer let in, its vms count as unknown."""

from collections.abc import Iterator

from trimtab_controller.core.doctor.facts import CertificateFacts, FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity

KINDS = ("certificate-expired", "certificate-expiring")
# Agents renew at half of the life: with less than this left, tries have failed for long.
WARN_SHARE = 0.33
SEVERE_SHARE = 0.1


def check(facts: FleetFacts) -> Iterator[Finding]:
    for one in facts.certificates:
        host = facts.host_by_id.get(one.host_id)
        if host is None:
            continue
        subject = f"host {host.name}"
        if one.not_after <= facts.now:
            yield Finding(
                severity=Severity.SEVERE,
                kind="certificate-expired",
                subject=subject,
                what=f"its {one.purpose} certificate has expired{_follows(one)}",
                cure=f"trimtab host token create {host.name} --rejoin",
                since=one.not_after,
            )
            continue
        left, life = one.not_after - facts.now, one.not_after - one.created_at
        if left < life * WARN_SHARE:
            hours = left.total_seconds() / 3600
            yield Finding(
                severity=Severity.SEVERE if left < life * SEVERE_SHARE else Severity.WARNING,
                kind="certificate-expiring",
                subject=subject,
                what=f"its {one.purpose} certificate expires in {hours:.1f} h and was not renewed at half of its life",
                cure=f"on {host.name}: systemctl restart trimtab-agent; journalctl -u trimtab-agent",
                # It was due then.
                since=one.created_at + life / 2,
            )


def _follows(one: CertificateFacts) -> str:
    return ": the host is not let in" if one.purpose == "agent" else ": nothing migrates to or from it"
