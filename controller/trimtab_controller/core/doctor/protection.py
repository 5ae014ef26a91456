"""Ways to make certain that a silent host is off: its warden, its power devices. Without any its vms wait for an operator."""

from collections import Counter

from trimtab_controller.core.doctor.model import Finding, FleetFacts, HostFacts, Severity


def unprotected(fleet: FleetFacts) -> tuple[Finding, ...]:
    """Only of hosts with vms to restart: of the others nothing has to be certain."""
    counts = Counter(vm.host_id for vm in fleet.vms if vm.is_protected and vm.desired_power == "running")
    return tuple(_of_host(host, counts[host.id]) for host in fleet.hosts if counts[host.id] and not _is_guarded(host))


def _is_guarded(host: HostFacts) -> bool:
    return host.is_warden_armed and bool(host.fences)


def _of_host(host: HostFacts, count: int) -> Finding:
    subject, arm = f"host {host.name}", f"on {host.name}: systemctl enable --now trimtab-warden"
    if host.is_warden_armed:
        return Finding(
            severity=Severity.NOTICE,
            kind="fence-missing",
            subject=subject,
            message="it has no power device: only its warden's lease proves it off",
            cure=f"trimtab fence config {host.name} --agent AGENT --address BMC --user USER --secret-file FILE",
        )
    if any(fence.is_ready for fence in host.fences):
        words = f"its warden is not armed: if it is lost, {count} vms wait for its power device"
        return Finding(severity=Severity.WARNING, kind="warden-not-armed", subject=subject, message=words, cure=arm)
    words = f"no armed warden and no power device that is ready: if it is lost, {count} vms stay down until an operator acts"
    return Finding(severity=Severity.CRITICAL, kind="host-unprotected", subject=subject, message=words, cure=arm)
