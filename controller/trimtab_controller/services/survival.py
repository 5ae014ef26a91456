"""What would be left: failover coverage and capacity, asked of the fleet as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.core.placement import HostSnapshot, PlacementKind, PlacementRequest
from trimtab_controller.core.planning import Estate
from trimtab_controller.core.planning.capacity import Figures, Fit, Largest, Shape, figures, fit, largest, with_added, without
from trimtab_controller.core.planning.domains import HOST, Domain, domains_of
from trimtab_controller.core.planning.proof import Coverage, DomainProof, FailoverProof, VmProof
from trimtab_controller.operations.estates import read_estate
from trimtab_controller.services import hosts_admin
from trimtab_protos.errors import Conflict, InvalidRequest

# Labels that are failure domains by their names; others are asked for.
USUAL_LABELS = ("rack", "zone")
# Reasons are worked out one by one: of the first so many vms in each domain.
REASONS_MAX = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncovered:
    vm_id: str
    vm: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainCoverage:
    proof: DomainProof
    uncovered: tuple[Uncovered, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VmCoverage:
    proof: VmProof
    vm: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetCoverage:
    domains: tuple[DomainCoverage, ...]
    vms: tuple[VmCoverage, ...]


def read(session: Session, *, now: datetime) -> Estate:
    return read_estate(session, now=now)


def coverage(
    estate: Estate, *, kinds: Sequence[str] = (), labels: Mapping[str, str] | None = None, by_vm: bool = False
) -> FleetCoverage:
    """Return for each domain who would not come back. Takes seconds for a large fleet.

    `kinds`: `host`, `pool`, label keys; by default hosts, racks and zones. `labels`: only these domains, as rack=r2. `by_vm`: every
    vm that runs as well. InvalidRequest where a label is on no host.
    """
    domains = _domains(estate, kinds, labels or {})
    proof = FailoverProof(estate, domains)
    told = tuple(_told(proof, result) for result in proof.results())
    return FleetCoverage(domains=told, vms=_by_vm(proof, told) if by_vm else ())


def _domains(estate: Estate, kinds: Sequence[str], labels: Mapping[str, str]) -> tuple[Domain, ...]:
    if labels:
        found = tuple(one for one in domains_of(estate, labels) if labels[one.kind] == one.value)
        if len(found) < len(labels):
            missing = sorted(labels.items() - {(one.kind, one.value) for one in found})
            raise InvalidRequest("label-unknown", f"no host has the label {missing[0][0]}={missing[0][1]}", field="selector")
        return found
    usual = [label for label in USUAL_LABELS if any(label in host.labels for host in estate.fleet.hosts)]
    return domains_of(estate, kinds or [HOST, *usual])


def _told(proof: FailoverProof, result: DomainProof) -> DomainCoverage:
    reasons = {vm_id: proof.why(vm_id, result.domain.key) for vm_id in result.uncovered[:REASONS_MAX]}
    return DomainCoverage(
        proof=result,
        uncovered=tuple(
            Uncovered(vm_id=vm_id, vm=proof.estate.vms[vm_id].name, reason=reasons.get(vm_id, "as those before it"))
            for vm_id in result.uncovered
        ),
    )


def _by_vm(proof: FailoverProof, told: Sequence[DomainCoverage]) -> tuple[VmCoverage, ...]:
    why = {lost.vm_id: lost.reason for one in reversed(told) for lost in one.uncovered}
    found = []
    for one in proof.vms():
        match one.coverage:
            case Coverage.COVERED:
                losses = ", ".join(f"{domain.kind} {domain.value}" for domain in one.domains)
                reason = f"the rest of the fleet has room for it, by every rule, after the loss of any of: {losses}"
            case Coverage.UNPROTECTED:
                reason = "its ha is none: it stays off with its host until somebody starts it"
            case Coverage.UNCOVERED:
                reason = why[one.vm_id]
        found.append(VmCoverage(proof=one, vm=proof.estate.vms[one.vm_id].name, reason=reason))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitWish:
    vcpus: int
    memory_mib: int
    host_selector: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Names or ids of hosts that are thought away; their vms are restarted elsewhere first."""
    add: tuple[Shape, ...] = ()
    """Hosts that are thought in: vcpus are cores, before the ratio of the default class."""
    keep_free_hosts: int = 0


def capacity(estate: Estate, *, by: str = "") -> tuple[Figures, ...]:
    return figures(estate, by=by)


def resolve(session: Session, wish: FitWish) -> tuple[str, ...]:
    """Return the ids of the hosts that are thought away. NotFound where there is none of that name."""
    return tuple(hosts_admin.find(session, name).id for name in wish.without)


def how_many(estate: Estate, wish: FitWish, *, without_ids: Sequence[str]) -> tuple[Fit, Largest]:
    """Return how many more vms of the shape fit under the wish, and the largest one that does, whatever is to be kept free.

    Conflict where hosts are to be added to a fleet without any.
    """
    if wish.add:
        if not estate.fleet.hosts:
            raise Conflict("fleet-empty", "there is no host that added ones could be like; add a host first")
        estate = with_added(estate, [_limits(estate, shape) for shape in wish.add], like=_typical(estate))
    homeless: tuple[str, ...] = ()
    if without_ids:
        estate, left = without(estate, without_ids)
        homeless = tuple(vm.name for vm in left)
    request = PlacementRequest(
        request_id="fit",
        vm_id="fit",
        vm_name="one more vm",
        project_id="",
        kind=PlacementKind.CREATE,
        vcpus=wish.vcpus,
        memory_mib=wish.memory_mib,
        host_selector=wish.host_selector,
    )
    found = fit(estate, request, keep_free_hosts=wish.keep_free_hosts)
    return replace(found, homeless=homeless), largest(estate, request)


def _typical(estate: Estate) -> HostSnapshot:
    return max(estate.fleet.hosts, key=lambda host: (host.vcpus_limit, host.name))


def _limits(estate: Estate, shape: Shape) -> Shape:
    """Return what a host of so many cores and so much memory would offer, by the ratio and reserve of its like."""
    like = _typical(estate)
    cores = max(1, estate.capacity_millis(like.host_id) // 1000)
    return Shape(shape.vcpus * like.vcpus_limit // cores, max(0, shape.memory_mib - like.memory_reserve_mib))
