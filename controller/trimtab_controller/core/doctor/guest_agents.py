"""Guests whose agent answered before and does not any more: no addresses, no quiet disks for backups, no orderly shutdown."""

from datetime import timedelta

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity, VmFacts
from trimtab_controller.core.guest_agents import GuestAgent

# A guest that boots slowly, or installs updates while it does, starts its agent last.
MISSED_AFTER = timedelta(minutes=10)


def stale(fleet: FleetFacts) -> tuple[Finding, ...]:
    """Only of hosts that answer: of the others nothing about guests is known."""
    up = {host.id for host in fleet.hosts if host.connectivity == "up"}
    return tuple(_finding(vm) for vm in fleet.vms if vm.host_id in up and not vm.is_busy and _is_missed(vm, fleet))


def _is_missed(vm: VmFacts, fleet: FleetFacts) -> bool:
    since = vm.guest_agent_since
    is_silent = vm.guest_agent == GuestAgent.SILENT and vm.observed_state == "running"
    return is_silent and since is not None and fleet.now - since >= MISSED_AFTER


def _finding(vm: VmFacts) -> Finding:
    words = "its guest agent answered before and does not any more: its addresses age, and its backups are as after a power cut"
    cure = f"trimtab vm ssh {vm.name} --project {vm.project} -- sudo systemctl restart qemu-guest-agent"
    if vm.os_family != "linux":
        words += "; start the agent's service in the guest (QEMU-GA in Windows)"
        cure = f"trimtab vm console {vm.name} --vnc --project {vm.project}"
    return Finding(
        severity=Severity.WARNING,
        kind="guest-agent-stale",
        subject=f"vm {vm.label}",
        message=words,
        cure=cure,
        since=vm.guest_agent_since,
    )
