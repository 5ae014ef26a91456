"""Hosts with vms to restart and only one way to prove them off, or with devices none of which is ready. Without any way at all:
`fences.missing`.
"""

from collections import Counter

from trimtab_controller.core.doctor.model import Finding, FleetFacts, HostFacts, Severity


def thin(fleet: FleetFacts) -> tuple[Finding, ...]:
    counts = Counter(vm.host_id for vm in fleet.vms if vm.is_kept)
    findings = (_of_host(host, counts[host.id]) for host in fleet.hosts if counts[host.id])
    return tuple(finding for finding in findings if finding is not None)


def _of_host(host: HostFacts, count: int) -> Finding | None:
    subject = f"host {host.name}"
    if host.is_warden_armed and not host.fences:
        return Finding(
            severity=Severity.NOTICE,
            kind="fence-missing",
            subject=subject,
            message="it has no power device: only the end of its lease proves it off",
            cure=f"trimtab fence config {host.name} --agent fence_redfish --address ADDRESS --secret-file FILE",
        )
    if host.is_warden_armed or not host.fences:
        return None
    if any(fence.is_ready for fence in host.fences):
        return Finding(
            severity=Severity.NOTICE,
            kind="warden-not-armed",
            subject=subject,
            message=f"its warden is not armed: if it is lost, {count} vms wait for its power device",
            cure=f"on {host.name}: set lease_fencing = true in agent.toml, then systemctl restart trimtab-agent",
        )
    return Finding(
        severity=Severity.CRITICAL,
        kind="host-unprotected",
        subject=subject,
        message=f"{count} of its vms shall restart elsewhere, but none of its power devices is ready and its warden is not armed",
        cure=f"trimtab fence test {host.name}",
    )
