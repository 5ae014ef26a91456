"""What is different between a database that was restored from the past and the hosts as they are. Pure.

The database lost what took place after it was saved: moves, starts, creations, deletions. The hosts lost nothing. So hosts are
believed about what runs, and nobody about what a silent host holds. Nothing is started, ended or deleted by what is decided here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from trimtab_protos.messages import DomainObservation, DomainState

ACTIVE = frozenset({DomainState.RUNNING, DomainState.PAUSED, DomainState.STOPPING})


class Difference(StrEnum):
    NEWER = "newer"
    """Its domain has a higher epoch or turn than the database: the numbers are raised."""
    ELSEWHERE = "elsewhere"
    """It runs on another host than the database says: that host becomes its home."""
    GONE = "gone"
    """Its home answered and has nothing of it: deleted, or moved to a host that is silent. Not started until its owner says so."""
    TWICE = "twice"
    """It runs on more than one host: an operator has to choose."""
    STRANGER = "stranger"
    """A domain of ours that the database does not know: made after it was saved. Shown, never touched."""
    DELETED = "deleted"
    """A domain of a vm that the database holds for deleted; shown."""
    UNKNOWN = "unknown"
    """Its home does not answer: what became of it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownVm:
    """A vm as the restored database has it; `host_id` '' : on none."""

    id: str
    name: str
    host_id: str
    epoch: int
    turn: int
    is_deleted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One difference. `epoch` and `turn`: what they have to be at least; `host_id`: where the vm is, '' where nobody knows."""

    difference: Difference
    vm_id: str
    name: str
    host_id: str
    epoch: int
    turn: int
    message: str


def compare(
    vms: Sequence[KnownVm], seen: Mapping[str, Sequence[DomainObservation]], host_names: Mapping[str, str]
) -> tuple[Finding, ...]:
    """Return what is different. `seen`: by host that answered, its domains of ours; hosts that are not in it are silent."""
    held: dict[str, list[tuple[str, DomainObservation]]] = {}
    for host_id, domains in seen.items():
        for domain in domains:
            held.setdefault(domain.vm_id, []).append((host_id, domain))
    found = [one for vm in vms if (one := _of_vm(vm, held.get(vm.id, []), seen, host_names)) is not None]
    known = {vm.id for vm in vms}
    for vm_id in sorted(held.keys() - known):
        host_id, domain = held[vm_id][0]
        message = (
            f"{domain.name or vm_id} is on {host_names[host_id]}, and the database does not know it: made after it was saved"
        )
        found.append(_finding(Difference.STRANGER, vm_id, domain.name, host_id, held[vm_id], message))
    return tuple(found)


def _finding(
    difference: Difference,
    vm_id: str,
    name: str,
    host_id: str,
    held: Sequence[tuple[str, DomainObservation]],
    message: str,
    vm: KnownVm | None = None,
) -> Finding:
    epoch = max([vm.epoch if vm else 0, *(domain.epoch for _host, domain in held)])
    turn = max([vm.turn if vm else 0, *(domain.turn for _host, domain in held)])
    return Finding(difference=difference, vm_id=vm_id, name=name, host_id=host_id, epoch=epoch, turn=turn, message=message)


def _of_vm(
    vm: KnownVm,
    held: Sequence[tuple[str, DomainObservation]],
    seen: Mapping[str, Sequence[DomainObservation]],
    host_names: Mapping[str, str],
) -> Finding | None:
    def finding(difference: Difference, host_id: str, message: str) -> Finding:
        return _finding(difference, vm.id, vm.name, host_id, held, message, vm)

    active = sorted(host_id for host_id, domain in held if domain.state in ACTIVE)
    places = ", ".join(host_names[host_id] for host_id in active)
    if vm.is_deleted:
        return finding(Difference.DELETED, held[0][0], f"{vm.name} is deleted, and a domain of it is there") if held else None
    if len(active) > 1:
        return finding(Difference.TWICE, "", f"{vm.name} runs on {places}: find out which is right before you touch either")
    if active and active[0] != vm.host_id:
        return finding(Difference.ELSEWHERE, active[0], f"{vm.name} runs on {places}; that becomes its home")
    if vm.host_id and vm.host_id not in seen:
        home = host_names.get(vm.host_id, vm.host_id)
        return finding(Difference.UNKNOWN, "", f"{home} does not answer: what became of {vm.name} is not known")
    if vm.host_id and not held:
        home = host_names[vm.host_id]
        message = f"{vm.name} is not on {home}, nor on any host that answered: `vm start` or `vm delete` says what it is to be"
        return finding(Difference.GONE, "", message)
    if any(domain.epoch > vm.epoch or domain.turn > vm.turn for _host, domain in held):
        return finding(Difference.NEWER, vm.host_id, f"{vm.name} was worked on since: its numbers are raised")
    return None
