"""Which vms the drift loop has to judge."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import LIVE_STATES, HostConnectivity
from trimtab_controller.core.model import Vm
from trimtab_controller.store import schema, vms
from trimtab_controller.store.rows import columns_of

# A guest paused by an I/O error is resumed only when its pool has this much room again.
RESUME_MARGIN_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    vm: Vm
    host_name: str
    is_host_up: bool
    has_space: bool
    """Whether every pool of its disks answers and has room."""
    is_filling: bool
    """Whether a disk of it still reads from a backup."""


def suspects(session: Session, *, limit: int, also: Collection[str] = ()) -> tuple[Suspect, ...]:
    """Return the vms that differ from their wish, are shown as if they did, or are among `also`, and that no operation works on."""
    vm, host, operation = schema.vm, schema.host, schema.operation
    busy = sa.select(operation.c.subject_id).where(
        operation.c.is_exclusive, operation.c.state.in_([s.value for s in LIVE_STATES])
    )
    query = (
        sa.select(*columns_of(vm, Vm), host.c.name.label("host_name"), host.c.connectivity)
        .outerjoin(host, host.c.id == vm.c.host_id)
        .where(
            vm.c.deleted_at.is_(None),
            vm.c.observed_at.is_not(None),
            sa.or_(vm.c.desired_power != vm.c.observed_state, vm.c.problem != "", vm.c.id.in_(also)),
            vm.c.id.not_in(busy),
        )
        .limit(limit)
    )
    rows: Sequence[Any] = session.execute(query).all()
    full = _vms_on_full_pools(session, [row.id for row in rows])
    volume = schema.volume
    reads = sa.select(volume.c.vm_id).where(volume.c.vm_id.in_([row.id for row in rows]), volume.c.fill_backup_id != "")
    filling = frozenset(session.scalars(reads))
    return tuple(
        Suspect(
            vm=vms.from_row(row),
            host_name=row.host_name or "its host",
            is_host_up=row.connectivity == HostConnectivity.UP.value,
            has_space=row.id not in full,
            is_filling=row.id in filling,
        )
        for row in rows
    )


def _vms_on_full_pools(session: Session, vm_ids: list[str]) -> frozenset[str]:
    """Return those with a disk in a pool that has no room, or that their host does not get an answer from."""
    volume, space, reach, vm = schema.volume, schema.pool_space, schema.pool_host, schema.vm
    full = (
        sa.select(volume.c.vm_id)
        .join(space, sa.and_(space.c.pool_id == volume.c.pool_id, space.c.host_id == volume.c.host_id))
        .where(volume.c.vm_id.in_(vm_ids), space.c.available_bytes < RESUME_MARGIN_BYTES)
    )
    failed = (
        sa.select(volume.c.vm_id)
        .join(vm, vm.c.id == volume.c.vm_id)
        .join(reach, sa.and_(reach.c.pool_id == volume.c.pool_id, reach.c.host_id == vm.c.host_id))
        .where(volume.c.vm_id.in_(vm_ids), reach.c.state.in_(("failed", "unresponsive")))
    )
    return frozenset(vm_id for vm_id in session.scalars(full.union(failed)) if vm_id is not None)


def strays_on(session: Session, host_id: str, vm_ids: Collection[str]) -> frozenset[str]:
    """Return those live vms of these that the host holds nothing of: they are not on it and have no claim there."""
    vm, claim = schema.vm, schema.claim
    claimed = sa.select(claim.c.vm_id).where(claim.c.host_id == host_id)
    query = sa.select(vm.c.id).where(
        vm.c.id.in_(vm_ids), vm.c.deleted_at.is_(None), vm.c.host_id != host_id, vm.c.id.not_in(claimed)
    )
    return frozenset(session.scalars(query))


def deleted_idle(session: Session, vm_ids: Collection[str]) -> tuple[Vm, ...]:
    """Return those of these that are deleted and that no operation works on."""
    vm, operation = schema.vm, schema.operation
    busy = sa.select(operation.c.subject_id).where(operation.c.state.in_([s.value for s in LIVE_STATES]))
    query = sa.select(*columns_of(vm, Vm)).where(vm.c.id.in_(vm_ids), vm.c.deleted_at.is_not(None), vm.c.id.not_in(busy))
    return tuple(vms.from_row(row) for row in session.execute(query))


def settled_on(session: Session, host_id: str, vm_ids: Collection[str]) -> frozenset[str]:
    """Return those live vms of these that have their home on the host and that no operation works on."""
    if not vm_ids:
        return frozenset()
    vm, operation = schema.vm, schema.operation
    busy = sa.select(operation.c.subject_id).where(operation.c.state.in_([s.value for s in LIVE_STATES]))
    query = sa.select(vm.c.id).where(
        vm.c.id.in_(vm_ids), vm.c.deleted_at.is_(None), vm.c.host_id == host_id, vm.c.id.not_in(busy)
    )
    return frozenset(session.scalars(query))
