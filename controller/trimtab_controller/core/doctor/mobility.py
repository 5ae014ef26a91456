"""Running guests that their host could not start again, or that no other host could take: by machine type, by CPU features.

CPU models are told of each vm (`vms.stuck`); what is here is told once for all vms of a host with the same need.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from trimtab_controller.core import cpu_features
from trimtab_controller.core.doctor.model import Finding, FleetFacts, HostFacts, Severity, VmFacts, some


@dataclass(frozen=True, slots=True)
class _Need:
    """A machine type or a set of CPU features, in words for people."""

    sort: str
    parts: frozenset[str]

    @property
    def text(self) -> str:
        return f"{'machine type' if self.sort == 'machine' else 'CPU features'} {', '.join(sorted(self.parts))}"

    def is_met_by(self, host: HostFacts) -> bool:
        """A host that has not told what it has is not blamed."""
        has = host.machines if self.sort == "machine" else host.cpu_features
        return not has or self.parts <= has


def bound(fleet: FleetFacts) -> tuple[Finding, ...]:
    homes = {host.id: host for host in fleet.hosts}
    groups: defaultdict[tuple[str, _Need], list[str]] = defaultdict(list)
    for vm in fleet.vms:
        if vm.host_id in homes and vm.observed_state == "running":
            for need in _needs(vm):
                groups[vm.host_id, need].append(vm.label)
    able = {need: {host.id for host in fleet.hosts if host.can_take_guests and need.is_met_by(host)} for _, need in groups}
    takers = {host.id for host in fleet.hosts if host.can_take_guests}
    found = []
    for (host_id, need), names in groups.items():
        home = homes[host_id]
        if not need.is_met_by(home):
            words = f"it no longer has {need.text}, which {len(names)} vms there run with: {some(names)}"
            found.append(_finding(home, Severity.CRITICAL, f"host-lost-{need.sort}", words))
        # Alone in the fleet a host has nowhere to move its vms to, whatever they need.
        if takers - {host_id} and not able[need] - {host_id}:
            words = f"no other host that takes vms has {need.text}: {len(names)} vms cannot move: {some(names)}"
            found.append(_finding(home, Severity.WARNING, f"vms-bound-by-{need.sort}", words))
    return tuple(found)


def _needs(vm: VmFacts) -> Iterator[_Need]:
    if vm.machine:
        yield _Need("machine", frozenset({vm.machine}))
    required = cpu_features.required(vm.cpu_features)
    if required:
        yield _Need("cpu-features", required)


def _finding(host: HostFacts, severity: Severity, kind: str, words: str) -> Finding:
    cure = f"trimtab host drain {host.name} --plan"
    return Finding(severity=severity, kind=kind, subject=f"host {host.name}", message=words, cure=cure)
