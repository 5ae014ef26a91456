"""Vms that are not as desired, cannot move, or would not come back."""

from trimtab_controller.core.doctor.model import Finding, FleetFacts, Severity, VmFacts, some
from trimtab_controller.core.drift import RUNS_TWICE


def troubled(fleet: FleetFacts) -> tuple[Finding, ...]:
    """A vm that is on its way says so in its operation; of the others its own problem or the plain difference is told."""
    found = []
    for vm in fleet.vms:
        if vm.is_busy:
            continue
        if vm.given_up_by == RUNS_TWICE:
            found.append(_finding(vm, Severity.CRITICAL, "vm-runs-twice", vm.problem, _get(vm)))
            continue
        if vm.given_up_by:
            words = f"{vm.given_up_by} gave it up: {vm.problem or 'no reason is known'}"
            cure = f"trimtab vm start {vm.name} --project {vm.project}"
            found.append(_finding(vm, Severity.CRITICAL, "vm-given-up", words, cure))
            continue
        words = vm.problem or _difference(vm)
        if words:
            found.append(_finding(vm, Severity.WARNING, "vm-problem" if vm.problem else "vm-drift", words, _get(vm)))
    return tuple(found)


def changed_by_hand(fleet: FleetFacts) -> tuple[Finding, ...]:
    return tuple(
        _finding(
            vm,
            Severity.WARNING,
            "vm-changed-by-hand",
            f"was changed by hand ({some(vm.hand_changes)}): the change is gone with the next definition, or stays unseen",
            f"trimtab vm diff {vm.name} --project {vm.project}",
        )
        for vm in fleet.vms
        if vm.hand_changes and not vm.is_busy
    )


def waiting_for_a_stop(fleet: FleetFacts) -> tuple[Finding, ...]:
    words = "has another size from its next stop on"
    return tuple(
        _finding(vm, Severity.NOTICE, "vm-waits-for-stop", words, f"trimtab vm reboot {vm.name} --project {vm.project}")
        for vm in fleet.vms
        if vm.is_adjusted_at_next_stop
    )


def stuck(fleet: FleetFacts) -> tuple[Finding, ...]:
    """Where a host lost a CPU flag the guest runs on, and no other host can take it."""
    hosts = {host.id: host for host in fleet.hosts}
    found = []
    for vm in fleet.vms:
        home = hosts.get(vm.host_id)
        if home is None or not vm.cpu_model or vm.observed_state != "running":
            continue
        if home.cpu_models and vm.cpu_model not in home.cpu_models:
            words = f"host {home.name} has lost its CPU model {vm.cpu_model}: once stopped it does not start there again"
            found.append(_finding(vm, Severity.CRITICAL, "host-lost-cpu-model", words, _move(vm)))
        others = [host for host in fleet.hosts if host.id != home.id and host.can_take_guests]
        if others and all(host.cpu_models and vm.cpu_model not in host.cpu_models for host in others):
            words = f"no other host that takes vms has its CPU model {vm.cpu_model}: it can neither move nor be recovered"
            found.append(
                _finding(vm, Severity.WARNING, "vm-cannot-move", words, f"trimtab vm explain {vm.name} --project {vm.project}")
            )
    return tuple(found)


def uncovered(fleet: FleetFacts) -> tuple[Finding, ...]:
    return tuple(
        Finding(
            severity=Severity.WARNING,
            kind="vm-uncovered",
            subject=f"vm {one.vm}",
            message=f"would not come back after the loss of {one.domain}: {one.reason}",
            cure="trimtab failover check",
        )
        for one in fleet.uncovered
    )


def _difference(vm: VmFacts) -> str:
    """Unknown is no difference: the host is silent, and that is told of the host."""
    as_desired = {"running": {"running", "unknown"}, "paused": {"paused", "unknown"}}
    stopped = {"stopped", "absent", "unknown"}
    if vm.observed_state in as_desired.get(vm.desired_power, stopped):
        return ""
    return f"shall be {vm.desired_power} and is {vm.observed_state}"


def _get(vm: VmFacts) -> str:
    return f"trimtab vm get {vm.name} --project {vm.project}"


def _move(vm: VmFacts) -> str:
    return f"trimtab vm migrate {vm.name} --project {vm.project}"


def _finding(vm: VmFacts, severity: Severity, kind: str, words: str, cure: str) -> Finding:
    return Finding(severity=severity, kind=kind, subject=f"vm {vm.project}/{vm.name}", message=words, cure=cure)
