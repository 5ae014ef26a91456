"""Vms and the explanations of their placement as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab_controller.api.render import etag_of
from trimtab_controller.api.resources.operations import OperationResource, render
from trimtab_controller.core.model import Vm, VmSummary
from trimtab_controller.core.placement.verdict import Decision, HostVerdict
from trimtab_controller.services.vm_views import VmView


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredResource:
    power: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedResource:
    """What was last proven, and how long ago."""

    state: str
    reason: str
    # '' where none had it.
    host: str
    at: datetime | None
    age_s: float | None
    addresses: tuple[str, ...]
    # What its balloon leaves it; 0 for one without a balloon.
    balloon_mib: int
    # What the QEMU that it runs says of itself where its host has another one installed by now, and that one; only where one vm is
    # asked for. '' : it runs the one that is installed, or nobody says.
    qemu: str
    installed_qemu: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeResource:
    vcpus: int
    vcpus_max: int
    memory_mib: int
    memory_max_mib: int
    # Least memory that its balloon leaves it; 0: it has none.
    balloon_min_mib: int
    # Of cpu time: low, normal, high; '' for none.
    cpu_class: str
    # What it becomes at its next stop; 0: stays as it is.
    next_vcpus: int
    next_memory_mib: int
    arch: str
    # '' until the first placement fixes it.
    machine: str
    cpu_model: str
    # Beside the model's own: "aes" has it, "-vmx" has it not, "?svm" has it where its host does; of adopted domains.
    cpu_features: tuple[str, ...]
    firmware: str
    has_secure_boot: bool
    has_tpm: bool
    # '' where none was named: then it is treated as linux.
    os: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VmVolumeResource:
    id: str
    name: str
    pool: str
    size_bytes: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NicResource:
    id: str
    network: str
    mac: str
    # bridge, nat, isolated or overlay.
    network_kind: str
    # Given to it, with prefix length.
    addresses: tuple[str, ...]
    # The floating address that leads to it; '' for none.
    floating: str
    # It may send as others.
    allow_spoofing: bool
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VmResource:
    id: str
    name: str
    project: str
    labels: dict[str, str]
    desired: DesiredResource
    observed: ObservedResource
    # Where it is placed; '' for nowhere.
    host: str
    epoch: int
    shape: ShapeResource
    host_selector: dict[str, str]
    host_class: str
    # What else it asked of its host: dedicated, hugepages_kib, numa_cells, devices, resources, tolerations; only what it did.
    wishes: dict[str, Any]
    # Its vm group; '' for none.
    group: str
    # What a drain may do with it: migrate, restart, wait.
    drain_policy: str
    # restart or none; higher priorities restart first.
    ha: str
    priority: int
    # '' for none.
    backup_policy: str
    # Seconds between the proof that its host is off and its restart; in a start group, after those of lower order run.
    start_delay_s: int
    # '' for none; lower orders start first after a loss.
    start_group: str
    start_order: int
    volumes: tuple[VmVolumeResource, ...]
    nics: tuple[NicResource, ...]
    # What may reach it; none: anything.
    secgroups: tuple[str, ...]
    # '' where it boots from a volume of its own.
    image: str
    # The ISO in its drive; '' for an empty drive, None for no drive.
    cdrom: str | None
    # The ISO in the drive with drivers; '' for no such drive.
    drivers: str
    problem: str
    # Fields of its domain that somebody changed by hand, as the last look found; `:diff` looks now.
    hand_changes: tuple[str, ...]
    # The one that is under way.
    operation: OperationResource | None
    deleted_at: datetime | None
    purge_after: datetime | None
    version: int
    etag: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class VmAnswer:
    operation: OperationResource
    vm: VmResource
    # Only with validate_only: where it would be placed, and why there.
    would_be_placed_on: str
    placement_summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasonResource:
    filter: str
    code: str
    message: str
    context: dict[str, str | int]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictResource:
    host: str
    fits: bool
    # 0..1; None for a host that does not fit.
    score: float | None
    scores: dict[str, float]
    reasons: tuple[ReasonResource, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnblockResource:
    """What would let a refused vm in; the scheduler decided it so when it refused."""

    host_id: str
    host: str
    # Of the request: [{field, message}].
    changes: tuple[dict[str, str], ...]
    # Of other vms, before it: [{vm_id, vm, from, to}].
    moves: tuple[dict[str, str], ...]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplanationResource:
    """Why the vm is where it is, or why no host took it."""

    vm: str
    # '' where no host fitted.
    host: str
    policy: str
    decided_at: datetime
    # The newest event when the fleet was read; null for decisions from before it was kept.
    fleet_revision: int | None
    summary: str
    # Hosts that fit first, best first; in a large fleet the best and the closest only.
    verdicts: tuple[VerdictResource, ...]
    host_count: int
    fit_count: int
    # Hosts refused, by filter.
    refused_by: dict[str, int]
    # NUMA cells of the host, for a vm that is pinned or on huge pages.
    cells: tuple[int, ...]
    # Of a refusal: what would let the vm in.
    unblocks: tuple[UnblockResource, ...]
    # A sentence about the host that was asked about; '' where none was.
    why_not: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleResource:
    content_base64: str
    next_offset: int


def render_vm(view: VmView, *, now: datetime, heard: Mapping[str, datetime]) -> VmResource:
    vm, names = view.vm, view.names
    project_name = names.get(vm.project_id, "")
    return VmResource(
        id=vm.id,
        name=vm.name,
        project=project_name,
        labels=dict(vm.labels),
        desired=DesiredResource(power=vm.desired_power.value),
        observed=_observed(view, now=now, heard=heard),
        host=names.get(vm.host_id, ""),
        epoch=vm.epoch,
        shape=_shape(vm),
        host_selector=dict(vm.host_selector),
        host_class=vm.host_class,
        group=view.group_name,
        drain_policy=vm.drain_policy,
        ha=vm.ha,
        priority=vm.priority,
        backup_policy=names.get(vm.backup_policy_id, ""),
        start_delay_s=vm.start_delay_s,
        start_group=vm.start_group,
        start_order=vm.start_order,
        wishes=dict(vm.wishes),
        volumes=tuple(
            VmVolumeResource(
                id=one.id, name=one.name, pool=names.get(one.pool_id, ""), size_bytes=one.size_bytes, index=one.disk_index or 0
            )
            for one in view.volumes
        ),
        nics=tuple(
            NicResource(
                id=one.id,
                network=names.get(one.network_id, ""),
                mac=one.mac,
                network_kind=view.network_kinds.get(one.network_id, ""),
                addresses=one.addresses,
                floating=view.floating.get(one.id, ""),
                allow_spoofing=one.allows_spoofing,
                index=one.nic_index,
            )
            for one in view.nics
        ),
        secgroups=view.secgroups,
        image=names.get(vm.image_id or "", ""),
        cdrom=names.get(vm.cdrom_image_id, "") if vm.has_cdrom else None,
        drivers=names.get(vm.drivers_image_id, ""),
        problem=vm.problem,
        hand_changes=vm.hand_changes,
        operation=render(view.operation, project_name=project_name) if view.operation else None,
        deleted_at=vm.deleted_at,
        purge_after=vm.purge_after,
        version=vm.version,
        etag=etag_of(vm.version),
        created_at=vm.created_at,
    )


def _shape(vm: Vm) -> ShapeResource:
    return ShapeResource(
        vcpus=vm.vcpus,
        vcpus_max=vm.vcpus_max,
        memory_mib=vm.memory_mib,
        memory_max_mib=vm.memory_max_mib,
        balloon_min_mib=vm.balloon_min_mib,
        cpu_class=vm.cpu_class,
        next_vcpus=vm.next_vcpus,
        next_memory_mib=vm.next_memory_mib,
        arch=vm.arch,
        machine=vm.machine,
        cpu_model=vm.cpu_model,
        cpu_features=vm.cpu_features,
        firmware=vm.firmware.value,
        has_secure_boot=vm.has_secure_boot,
        has_tpm=vm.has_tpm,
        os=vm.os,
    )


def confirmed(vm: Vm | VmSummary, *, now: datetime, heard: Mapping[str, datetime]) -> tuple[datetime | None, float | None]:
    """Return when a vm was last seen as it is, and how many seconds ago."""
    at = last_seen(vm, heard)
    return at, age_s(at, now) if at else None


def last_seen(vm: Vm | VmSummary, heard: Mapping[str, datetime]) -> datetime | None:
    """An observation is confirmed by every heartbeat of the host that made it, so it is as old as the last of them."""
    at, heard_at = vm.observed_at, heard.get(vm.observed_host_id)
    return max(at, heard_at) if at is not None and heard_at is not None else at


def age_s(at: datetime, now: datetime) -> float:
    return round(max(0.0, (now - at).total_seconds()), 1)


def _observed(view: VmView, *, now: datetime, heard: Mapping[str, datetime]) -> ObservedResource:
    vm = view.vm
    at, age_s = confirmed(vm, now=now, heard=heard)
    return ObservedResource(
        state=vm.observed_state.value,
        reason=vm.observed_reason,
        host=view.names.get(vm.observed_host_id, ""),
        at=at,
        age_s=age_s,
        addresses=vm.observed_addresses,
        balloon_mib=vm.observed_balloon_mib,
        qemu=view.other_qemu[0],
        installed_qemu=view.other_qemu[1],
    )


def render_decision(
    decision: Decision, *, vm_name: str, host_name: str, decided_at: datetime, fleet_revision: int | None, why_not: str
) -> ExplanationResource:
    return ExplanationResource(
        vm=vm_name,
        host=host_name,
        policy=decision.policy,
        decided_at=decided_at,
        fleet_revision=fleet_revision,
        summary=decision.summary(),
        verdicts=tuple(render_verdict(one) for one in decision.verdicts),
        host_count=decision.host_count,
        fit_count=decision.fit_count,
        refused_by=dict(decision.refused_by),
        cells=decision.cells,
        unblocks=tuple(UnblockResource(**one) for one in decision.unblocks),
        why_not=why_not,
    )


def render_verdict(verdict: HostVerdict) -> VerdictResource:
    return VerdictResource(
        host=verdict.host_name,
        fits=verdict.fits,
        score=verdict.score,
        scores=dict(verdict.scores),
        reasons=tuple(
            ReasonResource(filter=one.filter, code=one.code, message=one.message, context=dict(one.context))
            for one in verdict.refusals
        ),
    )
