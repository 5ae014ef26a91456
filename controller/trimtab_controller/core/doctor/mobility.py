"""Vms that can no longer move: what their guests were started with (CPU model, features, machine type), no other host has.

A host that cannot give its own vms what they run with (its CPU lost a flag by microcode or firmware, its QEMU a machine type) is
told as well: they run on, and do not start again there.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from trimtab_controller.core.doctor.facts import FleetFacts, VmFacts, some
from trimtab_controller.core.doctor.finding import Finding, Severity
from trimtab_controller.core.model import Host
from trimtab_protos.messages import Inventory

KINDS = ("host-lost-cpu", "host-lost-machine", "vm-bound-by-cpu", "vm-bound-by-machine")


@dataclass(frozen=True, slots=True)
class _Need:
    """What a guest needs of a host: of its CPU (model and features), or of its QEMU (machine type)."""

    arch: str
    cpu_model: str = ""
    cpu_features: frozenset[str] = frozenset()
    machine: str = ""

    def lacking(self, inventory: Inventory) -> str:
        """Return what the host lacks, '' where nothing."""
        if self.arch != inventory.arch:
            return f"architecture {self.arch}"
        if self.machine:
            return "" if self.machine in inventory.machines else f"machine type {self.machine}"
        if self.cpu_model and self.cpu_model not in inventory.usable_cpu_models:
            return f"CPU model {self.cpu_model}"
        missing = sorted(self.cpu_features - set(inventory.cpu_features))
        return f"CPU features {', '.join(missing)}" if missing else ""

    @property
    def text(self) -> str:
        if self.machine:
            return f"machine type {self.machine}"
        features = f" with {', '.join(sorted(self.cpu_features))}" if self.cpu_features else ""
        return f"CPU model {self.cpu_model or 'of the host'}{features}"


def check(facts: FleetFacts) -> Iterator[Finding]:
    known = {host.id: host.inventory for host in facts.hosts if host.inventory is not None}
    groups: defaultdict[tuple[str, _Need], list[VmFacts]] = defaultdict(list)
    for vm in facts.vms:
        if vm.host_id in known:
            for need in _needs(vm):
                groups[vm.host_id, need].append(vm)
    able = {need: frozenset(host_id for host_id, one in known.items() if not need.lacking(one)) for _, need in groups}
    for (host_id, need), vms in groups.items():
        yield from _of_group(facts.host_by_id[host_id], need, [vm.label for vm in vms], known=known, able=able[need])


def _needs(vm: VmFacts) -> Iterator[_Need]:
    if vm.machine:
        yield _Need(vm.arch, machine=vm.machine)
    if vm.cpu_model or vm.cpu_features:
        yield _Need(vm.arch, cpu_model=vm.cpu_model, cpu_features=frozenset(vm.cpu_features))


def _of_group(
    host: Host, need: _Need, names: list[str], *, known: Mapping[str, Inventory], able: Collection[str]
) -> Iterator[Finding]:
    sort = "machine" if need.machine else "cpu"
    cure = f"trimtab plan create drain {host.name} --dry-run"
    if host.id not in able:
        yield Finding(
            severity=Severity.SEVERE,
            kind=f"host-lost-{sort}",
            subject=f"host {host.name}",
            what=f"it no longer has {need.lacking(known[host.id])}, which {len(names)} vms there need: {some(names)}",
            cure=cure,
            since=host.inventory_at,
        )
    # Alone in the fleet a host has nowhere to move its vms to, whatever they need.
    if len(known) > 1 and not set(able) - {host.id}:
        yield Finding(
            severity=Severity.WARNING,
            kind=f"vm-bound-by-{sort}",
            subject=f"host {host.name}",
            what=f"no other host has {need.text}, so {len(names)} vms cannot move off: {some(names)}",
            cure=cure,
        )
