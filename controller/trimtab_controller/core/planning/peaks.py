"""The most that each target of a plan carries at any moment, so that nobody is surprised halfway."""

from collections.abc import Sequence

from trimtab_controller.core.placement.fleet import MEMORY, VCPUS
from trimtab_controller.core.planning.estate import Estate
from trimtab_controller.core.planning.plan import Step, TargetPeak


def peaks_of(estate: Estate, steps: Sequence[Step]) -> tuple[TargetPeak, ...]:
    """Return one peak per host that is entered, the fullest first. What leaves such a host is counted when it has left."""
    entered = {step.target_host_id for step in steps if step.target_host_id}
    fleet = estate.fleet
    now = {host_id: _claimed(estate, host_id) for host_id in entered}
    peaks = dict(now)
    for step in steps:
        if not step.moves_vm:
            continue
        vm = estate.vms[step.vm_id]
        amount = (vm.request.vcpus, vm.request.memory_mib, vm.load_millis)
        reached = now[step.target_host_id] = _plus(now[step.target_host_id], amount, 1)
        peaks[step.target_host_id] = _highest(peaks[step.target_host_id], reached)
        if step.host_id in now:
            now[step.host_id] = _plus(now[step.host_id], amount, -1)
    found = []
    for host_id, (vcpus, memory_mib, load_millis) in peaks.items():
        host = fleet.hosts[fleet.row_of[host_id]]
        found.append(
            TargetPeak(
                host_id=host_id,
                host_name=host.name,
                vcpus_share=round(vcpus / max(1, host.vcpus_limit), 4),
                memory_share=round(memory_mib / max(1, host.memory_limit_mib), 4),
                load_share=round(load_millis / estate.capacity_millis(host_id), 4),
            )
        )
    return tuple(sorted(found, key=lambda peak: (-max(peak.vcpus_share, peak.memory_share), peak.host_name)))


_Amount = tuple[int, int, int]


def _claimed(estate: Estate, host_id: str) -> _Amount:
    row, fleet = estate.fleet.row_of[host_id], estate.fleet
    vcpus = int(fleet.limits[VCPUS][row] - fleet.free[VCPUS][row])
    memory_mib = int(fleet.limits[MEMORY][row] - fleet.free[MEMORY][row])
    return vcpus, memory_mib, sum(vm.load_millis for vm in estate.on(host_id))


def _plus(held: _Amount, amount: _Amount, sign: int) -> _Amount:
    return held[0] + sign * amount[0], held[1] + sign * amount[1], held[2] + sign * amount[2]


def _highest(one: _Amount, other: _Amount) -> _Amount:
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])
