"""Failover proof: for every failure domain and every vm in it, whether the rest of the fleet can restart it. Kept along with changes.

A domain is a set of hosts that fail together: one host, all of a rack, of a zone, of any label's value. Its protected vms are
placed on the survivors as they are now, the most important and largest first, under every rule that binds a placement. Each domain
stands alone: the question is "if this fails now", not "if all of it fails one after the other". A pool is a domain too: whatever
has a disk on it is not covered by a restart.

Why it is quick, and why the answer after a change equals the answer from scratch: a domain looks at the survivors in a ring that
starts behind itself and takes the first that fits, so that it has read only the hosts up to the last one that it took. A change at
other hosts cannot change its answer. Only where the ring leaves a vm without a place is the whole fleet searched for the tightest
fit, and such a domain is looked at again after every change; so is one with a vm that the scheduler itself must place.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from trimtab_controller.core.placement import BEST_FIT, Books, FleetSnapshot, PlacementRequest, decide
from trimtab_controller.core.planning.classes import Classes
from trimtab_controller.core.planning.domains import Domain
from trimtab_controller.core.planning.estate import Estate, Power, VmSnapshot
from trimtab_controller.core.planning.survivors import Finding, Survivors, Victim


class Coverage(StrEnum):
    COVERED = "covered"
    UNCOVERED = "uncovered"
    # Nobody asked for a restart: high availability is off.
    UNPROTECTED = "unprotected"


@dataclass(frozen=True, slots=True)
class DomainProof:
    """What the loss of a domain means."""

    domain: Domain
    uncovered: tuple[str, ...]
    """Ids of vms that no survivor holds, in the order in which they would be restarted."""
    covered_count: int
    unprotected_count: int
    is_tight: bool
    """Room is so short that the first places found did not do."""

    @property
    def is_covered(self) -> bool:
        return not self.uncovered


@dataclass(frozen=True, slots=True)
class VmProof:
    """What the loss of each domain means to one vm that runs."""

    vm_id: str
    coverage: Coverage
    domains: tuple[Domain, ...]
    """Those whose loss would stop it."""
    uncovered: tuple[Domain, ...]
    """Of these, those whose loss it would not survive."""


@dataclass(frozen=True, slots=True)
class _Evidence:
    """An answer and what it rests on."""

    proof: DomainProof
    finding: Finding


@dataclass(frozen=True, slots=True)
class _Differences:
    is_other_fleet: bool
    """Rows or pools are not the same: nothing of the old answers holds."""
    free_rows: frozenset[int] = frozenset()
    attribute_rows: tuple[int, ...] = ()
    homes: frozenset[str] = frozenset()
    """Hosts on which some vm is not what it was."""
    is_any: bool = True
    """Anything at all: a label, too, that no class asks for makes the domains of a group's rule."""


class FailoverProof:
    """The proof of a whole estate; `update` brings it to another. Not thread-safe."""

    __slots__ = ("_classes", "_evidence", "_survivors", "_victim_of", "domains", "estate")

    def __init__(self, estate: Estate, domains: Iterable[Domain]) -> None:
        self.estate = estate
        self.domains = tuple(domains)
        self._begin()
        self._evidence = {domain.key: self._prove(domain) for domain in self.domains}

    def copy(self) -> "FailoverProof":
        """Return a proof to try claims on: an `update` of it leaves this one as it is, as long as no host's properties change."""
        return copy(self)  # answers are replaced, not written; what is remembered of vms and classes holds for both

    def results(self) -> tuple[DomainProof, ...]:
        """Return every domain's proof in the order of `domains`."""
        return tuple(self._evidence[domain.key].proof for domain in self.domains)

    def uncovered(self) -> dict[str, tuple[str, ...]]:
        """Return for each vm that is not covered the keys of the domains whose loss it would not survive."""
        found: dict[str, list[str]] = {}
        for proof in self.results():
            for vm_id in proof.uncovered:
                found.setdefault(vm_id, []).append(proof.domain.key)
        return {vm_id: tuple(keys) for vm_id, keys in found.items()}

    def vms(self) -> tuple[VmProof, ...]:
        """Return the proof of every vm that a domain's loss would stop, by name."""
        stops: dict[str, list[Domain]] = {}
        for domain in self.domains:
            for vm in self._users(domain) if domain.pool_id else self._present(domain):
                stops.setdefault(vm.vm_id, []).append(domain)
        lost = {vm_id: frozenset(keys) for vm_id, keys in self.uncovered().items()}
        found = []
        for vm_id in sorted(stops, key=lambda one: (self.estate.vms[one].name, one)):
            keys = lost.get(vm_id, frozenset())
            covered = Coverage.UNCOVERED if keys else Coverage.COVERED
            coverage = covered if self.estate.vms[vm_id].is_protected else Coverage.UNPROTECTED
            uncovered = tuple(domain for domain in stops[vm_id] if domain.key in keys)
            found.append(VmProof(vm_id, coverage, tuple(stops[vm_id]), uncovered))
        return tuple(found)

    def update(self, estate: Estate, domains: Iterable[Domain]) -> int:
        """Bring the proof to this estate; return how many domains had to be looked at again.

        The answer is that of a new proof of `estate`. Keep the snapshots of vms and hosts that did not change: they are
        recognised as the same objects.
        """
        old = {domain.key: domain for domain in self.domains}
        known, self._evidence = self._evidence, {}
        different = _differences(self.estate, estate)
        self.estate, self.domains = estate, tuple(domains)
        rebased = None if different.is_other_fleet else self._rebase(different)
        if rebased is None:
            self._begin()
            known = {}
        different = rebased or different
        count = 0
        for domain in self.domains:
            evidence = known.get(domain.key) if old.get(domain.key) == domain else None
            if evidence is None or self._is_touched(domain, evidence.finding, different):
                evidence = self._prove(domain)
                count += 1
            self._evidence[domain.key] = evidence
        return count

    def why(self, vm_id: str, key: str) -> str:
        """Return in a sentence why no survivor of this domain's loss holds the vm, as the scheduler says it."""
        domain = next(domain for domain in self.domains if domain.key == key)
        vm = self.estate.vms[vm_id]
        if domain.pool_id:
            return f"{vm.name} has a disk on pool {domain.value}: only a backup elsewhere brings it back"
        dead, books = tuple(sorted(domain.host_ids)), Books(self.estate.fleet)
        for other in sorted((one for one in self._present(domain) if one.is_protected), key=_urgency):
            if other.vm_id == vm_id:
                break
            request = _restart(other, dead)
            chosen = decide(books, request, policy=BEST_FIT, listed_hosts=-1).chosen_host_id
            if chosen is not None:
                books.claim(request, chosen)
        decision = decide(books, _restart(vm, dead), policy=BEST_FIT, listed_hosts=-1)
        if decision.chosen_host_id is not None:
            return f"the vms of {domain.key} together need more room than the rest of the fleet has, and {vm.name} comes last"
        return decision.summary()

    def _begin(self) -> None:
        self._classes = Classes(self.estate.fleet)
        self._survivors = Survivors(self.estate.fleet, self._classes)
        self._victim_of: dict[str, Victim] = {}

    def _rebase(self, different: _Differences) -> _Differences | None:
        """Take over the new fleet; return the differences with the rows at which some class's answer changed; None: start anew."""
        rows = self._classes.rebase(self.estate.fleet) if different.attribute_rows else []
        if rows is None:
            return None
        self._survivors = Survivors(self.estate.fleet, self._classes)
        return replace(different, attribute_rows=tuple(rows))

    def _is_touched(self, domain: Domain, finding: Finding, different: _Differences) -> bool:
        if finding.reads_all and different.is_any:
            return True
        if not domain.host_ids.isdisjoint(different.homes) or not finding.rows.isdisjoint(different.free_rows):
            return True
        size = len(self.estate.fleet)
        return any((row - finding.start) % size < finding.reach for row in different.attribute_rows)

    def _prove(self, domain: Domain) -> _Evidence:
        if domain.pool_id:
            return self._prove_pool(domain)
        present = self._present(domain)
        victims = [self._victim(vm) for vm in sorted(present, key=_urgency) if vm.is_protected]
        unprotected = len(present) - len(victims)
        finding = self._survivors.search(victims, domain.host_ids)
        covered = len(victims) - len(finding.missing)
        return _Evidence(DomainProof(domain, finding.missing, covered, unprotected, finding.is_tight), finding)

    def _prove_pool(self, domain: Domain) -> _Evidence:
        users = self._users(domain)
        lost = tuple(vm.vm_id for vm in sorted(users, key=_urgency) if vm.is_protected)
        finding = Finding(lost, frozenset(), 0, 0, reads_all=True, is_tight=False)
        return _Evidence(DomainProof(domain, lost, 0, len(users) - len(lost), is_tight=False), finding)

    def _users(self, domain: Domain) -> list[VmSnapshot]:
        """Return the vms that run with a disk on the domain's pool."""
        return [
            vm
            for vm in self.estate.vms.values()
            if vm.power is not Power.STOPPED and any(disk.pool_id == domain.pool_id for disk in vm.request.disks)
        ]

    def _present(self, domain: Domain) -> list[VmSnapshot]:
        """Return the vms that the domain's loss would stop. One of unknown state may have run: it counts."""
        vms, by_host = self.estate.vms, self.estate.by_host
        found = [vms[vm_id] for host_id in domain.host_ids for vm_id in by_host.get(host_id, ())]
        return [vm for vm in found if vm.power is not Power.STOPPED]

    def _victim(self, vm: VmSnapshot) -> Victim:
        known = self._victim_of.get(vm.vm_id)
        if known is None or known.vm is not vm:
            known = self._victim_of[vm.vm_id] = Victim.of(vm, self._classes, self.estate.fleet)
        return known


def _urgency(vm: VmSnapshot) -> tuple[int, int, int, str]:
    return -vm.priority, -vm.request.memory_mib, -vm.request.vcpus, vm.vm_id


def _restart(vm: VmSnapshot, dead: Sequence[str]) -> PlacementRequest:
    return replace(vm.restart_request(), excluded_host_ids=tuple(dead))


def _differences(old: Estate, new: Estate) -> _Differences:
    if _pools(old.fleet) != _pools(new.fleet) or old.fleet.free.keys() != new.fleet.free.keys():
        return _Differences(is_other_fleet=True)
    if [host.host_id for host in old.fleet.hosts] != [host.host_id for host in new.fleet.hosts]:
        return _Differences(is_other_fleet=True)
    free_rows: set[int] = set()
    for resource, column in new.fleet.free.items():
        free_rows.update(np.flatnonzero(column != old.fleet.free[resource]).tolist())
    other = [
        row
        for row, (before, after) in enumerate(zip(old.fleet.hosts, new.fleet.hosts, strict=True))
        if before is not after and before != after
    ]
    homes = {host_id for host_id, vm_ids in new.by_host.items() if vm_ids != old.by_host[host_id]}
    # Vms are also counted whose host has left the fleet: those stand in no host's list.
    homes.update(vm.host_id for vm_id, vm in old.vms.items() if vm_id not in new.vms)
    homes.update([vm.host_id for vm_id, vm in new.vms.items() if old.vms.get(vm_id) is not vm])
    rows = tuple(row for row in other if _without_claims(old.fleet, row) != _without_claims(new.fleet, row))
    return _Differences(
        is_other_fleet=False,
        free_rows=frozenset(free_rows),
        attribute_rows=rows,
        homes=frozenset(homes),
        is_any=bool(free_rows or rows or homes) or old.fleet.members != new.fleet.members,
    )


def _without_claims(fleet: FleetSnapshot, row: int) -> object:
    return replace(fleet.hosts[row], vcpus_claimed=0, memory_claimed_mib=0, generation=0)


def _pools(fleet: FleetSnapshot) -> list[tuple[str, bool, bool]]:
    return [(pool.pool_id, pool.is_shared, pool.is_sharing_proven) for pool in fleet.pools.values()]
