"""Vms as users see them, with all that is shown beside: a constant number of queries for any number of vms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.core.model import Nic, Operation, Project, Vm, VmSummary, Volume, VolumeSummary
from trimtab_controller.core.placement.verdict import Decision
from trimtab_controller.store import (
    floating,
    hosts,
    keyset,
    lookup,
    networks,
    operations,
    placements,
    schema,
    secgroups,
    vm_groups,
    vm_listing,
    vms,
    volumes,
)
from trimtab_protos.errors import NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class VmView:
    vm: Vm
    volumes: Sequence[Volume | VolumeSummary]
    nics: tuple[Nic, ...]
    # The one that locks the vm, if any.
    operation: Operation | None
    # id -> name, of everything the vm refers to; shared by all views of a page.
    names: Mapping[str, str]
    # '' where it is in no group.
    group_name: str = ""
    # Names of its security groups.
    secgroups: tuple[str, ...] = ()
    # Card -> the floating address that leads to it.
    floating: Mapping[str, str] = field(default_factory=dict)
    # Network -> its kind; shared by all views of a page.
    network_kinds: Mapping[str, str] = field(default_factory=dict)
    # What its QEMU says of itself, and what the installed one does: of a single vm that runs another. '' both: it does not.
    other_qemu: tuple[str, str] = ("", "")


NO_ADDRESSES = "[]"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSummaries:
    """A page of vms as a list of many shows them."""

    vms: tuple[VmSummary, ...]
    # Of those that nothing was seen of: what was declared for their nics, with prefix length.
    addresses: Mapping[str, Sequence[str]]
    # Those that lock one of the vms, by vm.
    live: Mapping[str, Operation]
    # id -> name, of everything the vms refer to.
    names: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class VmExplanation:
    vm: Vm
    decision: Decision
    decided_at: datetime
    # The newest event when the fleet was read; None of decisions from before it was kept.
    fleet_revision: int | None
    # Name of the host it chose; '' for none.
    host_name: str


def views(session: Session, found: Sequence[Vm]) -> tuple[VmView, ...]:
    if not found:
        return ()
    ids = [vm.id for vm in found]
    disks, nics, live = volumes.of_vms(session, ids), vms.nics_of(session, ids), operations.live_by_subject(session, ids)
    names = lookup.names_in(
        session,
        {
            schema.project: {vm.project_id for vm in found},
            schema.host: {vm.host_id for vm in found} | {vm.observed_host_id for vm in found},
            schema.backup_policy: {vm.backup_policy_id for vm in found},
            schema.image: {vm.image_id for vm in found}
            | {vm.cdrom_image_id for vm in found}
            | {vm.drivers_image_id for vm in found},
            schema.pool: {volume.pool_id for some in disks.values() for volume in some},
            schema.network: {nic.network_id for some in nics.values() for nic in some},
        },
    )
    groups, closed_by = vm_groups.names_of(session, ids), secgroups.names_of(session, ids)
    cards = [nic for some in nics.values() for nic in some]
    kinds = networks.kinds_of(session, {nic.network_id for nic in cards})
    led = floating.of_nics(session, [nic.id for nic in cards if kinds.get(nic.network_id) == "overlay"])
    return tuple(
        VmView(
            vm=vm,
            volumes=disks[vm.id],
            nics=nics[vm.id],
            operation=live.get(vm.id),
            names=names,
            group_name=groups.get(vm.id, ""),
            secgroups=closed_by.get(vm.id, ()),
            floating={nic.id: led[nic.id].name for nic in nics[vm.id] if nic.id in led},
            network_kinds=kinds,
        )
        for vm in found
    )


def read(session: Session, vm_id: str) -> VmView:
    """Return one vm as it is now."""
    view = views(session, [vms.get(session, vm_id)])[0]
    host_id = view.vm.observed_host_id
    inventory = hosts.get(session, host_id).inventory if host_id and hosts.is_live(session, host_id) else None
    if inventory is None:
        return view
    running = next((one.build or "unknown" for one in inventory.guest_qemus if one.vm_id == vm_id), "")
    return replace(view, other_qemu=(running, inventory.qemu_build)) if running else view


def page(
    session: Session, page: keyset.Page, *, project_id: str, with_deleted: bool
) -> tuple[tuple[VmView, ...], tuple[str, str] | None]:
    found, next_after = vm_listing.page(session, page, project_ids=[project_id], with_deleted=with_deleted)
    return views(session, found), next_after


def summaries(
    session: Session, page: keyset.Page, *, project_id: str, with_deleted: bool
) -> tuple[VmSummaries, tuple[str, str] | None]:
    found, next_after = vm_listing.summaries(session, page, project_id=project_id, with_deleted=with_deleted)
    ids = [vm.id for vm in found]
    names = lookup.names_in(
        session,
        {
            schema.project: {project_id},
            schema.host: {vm.host_id for vm in found} | {vm.observed_host_id for vm in found},
            schema.image: {vm.image_id for vm in found},
        },
    )
    unseen = [vm.id for vm in found if vm.observed_addresses == NO_ADDRESSES]
    return VmSummaries(
        vms=found,
        addresses=vms.declared_addresses(session, unseen),
        live=operations.live_by_subject(session, ids),
        names=names,
    ), next_after


def by_ids(session: Session, vm_ids: Sequence[str], *, project_id: str) -> tuple[VmView, ...]:
    """Return these vms of the project, deleted ones too."""
    return views(session, [vm for vm in vm_listing.by_ids(session, vm_ids) if vm.project_id == project_id])


def explain(session: Session, vm: Vm, *, project: Project) -> VmExplanation:
    """Return why the vm is where it is. NotFound while nothing was decided, or once the decision is no longer kept."""
    row = placements.latest_decision(session, vm.id)
    if row is None:
        raise NotFound(
            "decision-not-found",
            f"vm {vm.name} in project {project.name}: no placement was decided yet, or it is older than what is kept",
        )
    names = lookup.names(session, schema.host, [row.chosen_host_id])
    return VmExplanation(
        vm=vm,
        decision=Decision.from_json(row.verdicts),
        decided_at=row.created_at,
        fleet_revision=row.fleet_revision,
        host_name=names.get(row.chosen_host_id, ""),
    )
