"""Hosts that nothing could prove off, and power devices that nobody tried or that did not answer: found out before the outage."""

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


def missing(fleet: FleetFacts) -> tuple[Finding, ...]:
    """Find hosts with vms to restart elsewhere that nobody could prove off but an operator."""
    kept: dict[str, int] = {}
    for vm in fleet.vms:
        if vm.is_kept:
            kept[vm.host_id] = kept.get(vm.host_id, 0) + 1
    return tuple(
        Finding(
            severity=Severity.CRITICAL,
            kind="host-unprotected",
            subject=f"host {host.name}",
            message=f"{kept[host.id]} of its vms shall restart elsewhere, but it has no power device and its warden is not armed",
            cure=f"trimtab fence config {host.name} --agent fence_redfish --address ADDRESS --secret-file FILE",
        )
        for host in fleet.hosts
        if host.id in kept and not host.fences and not host.is_warden_armed
    )
