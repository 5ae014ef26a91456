"""Hosts that are not heard from, and those that take no vms."""

from collections.abc import Iterator

from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity
from trimtab_controller.core.lifecycle import HostConnectivity
from trimtab_controller.core.model import Host

KINDS = ("host-cordoned", "host-fenced", "host-lost", "host-suspect")


def check(facts: FleetFacts) -> Iterator[Finding]:
    for host in facts.hosts:
        match host.connectivity:
            case HostConnectivity.LOST:
                said = "it is lost: not heard from, and not proven off"
                yield _silent(host, Severity.SEVERE, "host-lost", said, f"trimtab failover get {host.name}")
            case HostConnectivity.FENCED:
                said = "it is proven off; its capacity is missing until it is back"
                yield _silent(host, Severity.WARNING, "host-fenced", said, f"trimtab failover get {host.name}")
            case HostConnectivity.SUSPECT:
                said = "it has missed renewals of its lease"
                yield _silent(host, Severity.WARNING, "host-suspect", said, f"trimtab host get {host.name}")
            case HostConnectivity.NEW | HostConnectivity.UP:
                pass
        if host.id in facts.maintenance:
            yield Finding(
                severity=Severity.NOTICE,
                kind="host-cordoned",
                subject=f"host {host.name}",
                what="it is held in maintenance and takes no vms",
                cure=f"trimtab host maintenance end {host.name}",
                since=facts.maintenance[host.id],
            )
        elif host.is_cordoned:
            yield Finding(
                severity=Severity.NOTICE,
                kind="host-cordoned",
                subject=f"host {host.name}",
                what="it is cordoned and takes no vms",
                cure=f"trimtab host uncordon {host.name}",
            )


def _silent(host: Host, severity: Severity, kind: str, what: str, cure: str) -> Finding:
    return Finding(severity=severity, kind=kind, subject=f"host {host.name}", what=what, cure=cure, since=host.connectivity_at)
