"""Plans, failover coverage and capacity as JSON."""

from dataclasses import dataclass
from datetime import datetime

from trimtab_controller.api.resources.operations import OperationResource
from trimtab_controller.core.planning.capacity import Figures, Fit, Largest, Shape
from trimtab_controller.services.lost_disks import AtStake
from trimtab_controller.services.plans import PlanView
from trimtab_controller.services.survival import FleetCoverage


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStepResource:
    position: int
    kind: str
    # pending, stopping, running, done, skipped, failed, cancelled.
    state: str
    vm: str
    host: str
    target: str
    # False: the scheduler picks the target when the step's turn comes.
    is_target_fixed: bool
    after: tuple[int, ...]
    copied_bytes: int
    # Forecast, from the start of the plan.
    starts_s: float
    ends_s: float
    operation: str
    message: str
    why: str
    # Of a step that moves a volume: which, from where, to where.
    volume: str
    pool: str
    target_pool: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockerResource:
    cause: str
    vm: str
    host: str
    message: str
    cure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakResource:
    host: str
    # Shares of the host's limits.
    vcpus: float
    memory: float
    # Predicted CPU use.
    load: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResource:
    id: str
    kind: str
    # open, applying, applied, incomplete, cancelled.
    state: str
    summary: str
    hosts: tuple[str, ...]
    move_count: int
    blocker_count: int
    duration_s: float
    deadline_s: float | None
    # The vm that is in the way of the deadline; '' where all are in time.
    late: str
    before: dict[str, float]
    expected: dict[str, float]
    operation: str
    created_by: str
    created_at: datetime
    blockers: tuple[BlockerResource, ...]
    peaks: tuple[PeakResource, ...]
    # Only where one plan is asked for.
    steps: tuple[PlanStepResource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceAnswer:
    operation: OperationResource
    plan: PlanResource


@dataclass(frozen=True, slots=True, kw_only=True)
class UncoveredResource:
    vm_id: str
    vm: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainResource:
    # host, pool or the key of a label.
    kind: str
    name: str
    is_covered: bool
    covered_count: int
    unprotected_count: int
    # Room is so short that a search for the tightest fit was needed.
    is_tight: bool
    uncovered: tuple[UncoveredResource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalVmResource:
    vm_id: str
    vm: str
    host: str
    # By itself, five minutes after its host was proven off.
    comes_back: bool
    why: str
    # Its newest whole backup; None: all of its local disks would be lost.
    backup: str | None
    backup_at: datetime | None
    loss_window_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmCoverageResource:
    vm_id: str
    vm: str
    # covered, uncovered, or unprotected: its ha is none.
    coverage: str
    # The losses that would stop it, as host:node1; of these, those that it would not survive.
    domains: tuple[str, ...]
    uncovered: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverageResource:
    is_covered: bool
    domains: tuple[DomainResource, ...]
    # Every vm that runs, where that was asked for.
    vms: tuple[VmCoverageResource, ...]
    # Vms with a disk that only their host has, at most 1,000 of them.
    local_vms: tuple[LocalVmResource, ...]
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeResource:
    vcpus: int
    memory_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FiguresResource:
    name: str
    host_count: int
    open_count: int
    vm_count: int
    vcpus_limit: int
    vcpus_claimed: int
    vcpus_free: int
    memory_limit_mib: int
    memory_claimed_mib: int
    memory_free_mib: int
    # Thousandths of a core; 0 where nothing was measured.
    used_millis: int
    stranded_vcpus: int
    stranded_memory_mib: int
    reference: ShapeResource
    # Of a plain vm: no tolerations, no project with hosts of its own, nothing special asked, a disk on a ready pool with space left.
    largest_by_vcpus: ShapeResource
    largest_by_memory: ShapeResource


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityResource:
    items: tuple[FiguresResource, ...]
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResource:
    count: int
    # There are at least so many.
    is_capped: bool
    by_host: dict[str, int]
    # Vms of the hosts that were left out for which the rest has no place.
    homeless: tuple[str, ...]
    refusal: str
    # The largest vm on the same hosts that the scheduler would place, alone, whatever is to be kept free.
    largest_by_vcpus: ShapeResource
    largest_by_memory: ShapeResource
    at: datetime


def render_plan(view: PlanView) -> PlanResource:
    plan, row, names = view.plan, view.row, view.host_names
    states = {one.position: one for one in view.steps}
    steps = []
    for step in plan.steps if view.is_full else ():
        own = states.get(step.position)
        target = own.target_host_id if own is not None else step.target_host_id
        steps.append(
            PlanStepResource(
                position=step.position,
                kind=step.kind.value,
                state=own.state if own is not None else "pending",
                vm=step.vm_name,
                host=names.get(step.host_id, step.host_id),
                target=names.get(target, target),
                is_target_fixed=step.is_target_fixed,
                after=step.after,
                copied_bytes=step.copied_bytes,
                starts_s=step.starts_s,
                ends_s=step.ends_s,
                operation=own.operation_id if own is not None else "",
                message=own.message if own is not None else "",
                why=step.why,
                volume=step.volume_name,
                pool=names.get(step.pool_id, step.pool_id),
                target_pool=names.get(step.target_pool_id, step.target_pool_id),
            )
        )
    return PlanResource(
        id=row.id,
        kind=row.kind,
        state=row.state,
        summary=row.summary,
        hosts=tuple(names.get(host_id, host_id) for host_id in plan.scope),
        move_count=len(plan.moves),
        blocker_count=len(plan.blockers),
        duration_s=plan.duration_s,
        deadline_s=plan.deadline_s,
        late=plan.late,
        before=dict(plan.before),
        expected=dict(plan.expected),
        operation=row.operation_id,
        created_by=row.created_by,
        created_at=row.created_at,
        blockers=tuple(
            BlockerResource(
                cause=one.cause.value,
                vm=one.vm_name,
                host=names.get(one.host_id, one.host_id),
                message=one.message,
                cure=one.cure,
            )
            for one in plan.blockers
        ),
        peaks=tuple(
            PeakResource(host=one.host_name, vcpus=one.vcpus_share, memory=one.memory_share, load=one.load_share)
            for one in plan.peaks
        ),
        steps=tuple(steps),
    )


def render_coverage(found: FleetCoverage, stakes: tuple[AtStake, ...], *, at: datetime) -> CoverageResource:
    domains = tuple(
        DomainResource(
            kind=one.proof.domain.kind,
            name=one.proof.domain.value,
            is_covered=one.proof.is_covered,
            covered_count=one.proof.covered_count,
            unprotected_count=one.proof.unprotected_count,
            is_tight=one.proof.is_tight,
            uncovered=tuple(UncoveredResource(vm_id=lost.vm_id, vm=lost.vm, reason=lost.reason) for lost in one.uncovered),
        )
        for one in found.domains
    )
    vms = tuple(
        VmCoverageResource(
            vm_id=one.proof.vm_id,
            vm=one.vm,
            coverage=one.proof.coverage.value,
            domains=tuple(domain.key for domain in one.proof.domains),
            uncovered=tuple(domain.key for domain in one.proof.uncovered),
            reason=one.reason,
        )
        for one in found.vms
    )
    local_vms = tuple(
        LocalVmResource(
            vm_id=one.vm.id,
            vm=one.vm.name,
            host=one.host_name,
            comes_back=one.answer.is_due,
            why=one.answer.why,
            backup=one.backup.id if one.backup else None,
            backup_at=(one.backup.taken_at or one.backup.created_at) if one.backup else None,
            loss_window_s=one.loss_s,
        )
        for one in stakes
    )
    is_covered = all(one.is_covered for one in domains)
    return CoverageResource(is_covered=is_covered, domains=domains, vms=vms, local_vms=local_vms, at=at)


def render_capacity(found: tuple[Figures, ...], *, at: datetime) -> CapacityResource:
    items = tuple(
        FiguresResource(
            name=one.name,
            host_count=one.host_count,
            open_count=one.open_count,
            vm_count=one.vm_count,
            vcpus_limit=one.vcpus_limit,
            vcpus_claimed=one.vcpus_claimed,
            vcpus_free=one.vcpus_free,
            memory_limit_mib=one.memory_limit_mib,
            memory_claimed_mib=one.memory_claimed_mib,
            memory_free_mib=one.memory_free_mib,
            used_millis=one.used_millis,
            stranded_vcpus=one.stranded_vcpus,
            stranded_memory_mib=one.stranded_memory_mib,
            reference=_shape(one.reference),
            largest_by_vcpus=_shape(one.largest_by_vcpus),
            largest_by_memory=_shape(one.largest_by_memory),
        )
        for one in found
    )
    return CapacityResource(items=items, at=at)


def _shape(shape: Shape) -> ShapeResource:
    return ShapeResource(vcpus=shape.vcpus, memory_mib=shape.memory_mib)


def render_fit(found: Fit, largest: Largest, *, at: datetime) -> FitResource:
    return FitResource(
        count=found.count,
        is_capped=found.is_capped,
        by_host=dict(found.by_host),
        homeless=found.homeless,
        refusal=found.refusal,
        largest_by_vcpus=_shape(largest.by_vcpus),
        largest_by_memory=_shape(largest.by_memory),
        at=at,
    )
