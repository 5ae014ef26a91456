"""Ways to make certain that a silent host is off: its warden, its power devices. Without any its vms wait for an operator."""

from collections.abc import Iterator, Sequence

from trimtab_controller.core.doctor.facts import FleetFacts
from trimtab_controller.core.doctor.finding import Finding, Severity
from trimtab_controller.core.model import Host
from trimtab_controller.core.model.failover import FencePathRow

KINDS = ("fence-failed", "fence-missing", "fence-untested", "host-unprotected", "warden-not-armed")


def check(facts: FleetFacts) -> Iterator[Finding]:
    paths: dict[str, list[FencePathRow]] = {}
    for path in facts.fence_paths:
        paths.setdefault(path.host_id, []).append(path)
    for host in facts.hosts:
        own = paths.get(host.id, [])
        yield from _of_paths(host, own)
        yield from _of_warden(facts, host, own)


def _of_paths(host: Host, paths: Sequence[FencePathRow]) -> Iterator[Finding]:
    subject, test = f"host {host.name}", f"trimtab fence test {host.name}"
    if not paths:
        yield Finding(
            severity=Severity.NOTICE,
            kind="fence-missing",
            subject=subject,
            what="it has no power device that could prove it off",
            cure=f"trimtab fence config {host.name} --agent fence_ipmilan --address BMC --user USER --secret-file FILE",
        )
    for path in paths:
        if path.tested_at is None:
            what = f"its power device {path.name} was never tested"
            yield Finding(severity=Severity.WARNING, kind="fence-untested", subject=subject, what=what, cure=test)
        elif not path.is_ready:
            what = f"its power device {path.name} cannot be relied on: {path.test_message or 'it did not answer'}"
            yield Finding(
                severity=Severity.WARNING, kind="fence-failed", subject=subject, what=what, cure=test, since=path.tested_at
            )


def _of_warden(facts: FleetFacts, host: Host, paths: Sequence[FencePathRow]) -> Iterator[Finding]:
    count = len(facts.protected.get(host.id, ()))
    if not count or host.id in facts.armed:
        return
    cure = f"on {host.name}: systemctl enable --now trimtab-warden"
    if any(path.is_ready for path in paths):
        what = f"its warden is not armed: {count} vms wait for its power device when it is lost"
        yield Finding(severity=Severity.WARNING, kind="warden-not-armed", subject=f"host {host.name}", what=what, cure=cure)
        return
    what = f"no armed warden and no tested power device: if it is lost, {count} vms stay down until an operator acts"
    yield Finding(severity=Severity.SEVERE, kind="host-unprotected", subject=f"host {host.name}", what=what, cure=cure)
