"""What plans, proof and capacity read of the vms: all of them at once, a fixed number of queries per some hundred vms."""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import LIVE_STATES
from trimtab_controller.store import fleet, schema
from trimtab_controller.store.fleet import VmNeeds

# Parameters of one statement: SQLite takes 32,766, and each id is one in several of them.
_CHUNK = 500
_LIVE = tuple(state.value for state in LIVE_STATES)


@dataclass(frozen=True, slots=True)
class EstateVm:
    needs: VmNeeds
    drain_policy: str
    has_compute: bool
    """Whether its home claim holds vcpus, memory or of the host's stocks: a stopped vm's does not."""
    busy_with: str
    """The operation that is under way on it, '' for none."""
    has_local_layers: bool = False
    """Whether a disk on its host's own storage has layers, which snapshots keep or clones lie over."""
    linked_clones: tuple[str, ...] = ()
    """The vms whose disks lie over those of its own that are on its host's own storage."""


def placed_vms(session: Session) -> tuple[EstateVm, ...]:
    """Return every live vm that is on a host."""
    policies = {row.id: row.drain_policy for row in session.execute(_on_hosts(schema.vm.c.drain_policy))}
    holding, busy = _holding(session), _busy(session)
    layered, clones = _layered(session), _linked_clones(session)
    return tuple(
        EstateVm(needs, policies[vm_id], vm_id in holding, busy.get(vm_id, ""), vm_id in layered, clones.get(vm_id, ()))
        for vm_id, needs in _needs(session, policies).items()
    )


def marks(session: Session) -> dict[str, Hashable]:
    """Return for every live vm on a host a mark: as long as it stays the same, so does what the vm needs and holds.

    It costs a tenth of reading that. What is under way on the vm, what a drain may do with it and how it was observed are left out.
    """
    table, volume, nic = schema.vm, schema.volume, schema.nic
    parts: dict[str, list[Hashable]] = {}
    holding = _holding(session)
    for vm_id, host_id, version in session.execute(_on_hosts(table.c.host_id, table.c.version)):
        parts[vm_id] = [host_id, version, vm_id in holding]
    volumes = sa.select(volume.c.vm_id, volume.c.id, volume.c.version).where(volume.c.vm_id.is_not(None)).order_by(volume.c.id)
    # Ids grow: nics that came or went change their number or the last of them.
    nics = sa.select(nic.c.vm_id, sa.func.count(), sa.func.max(nic.c.id)).group_by(nic.c.vm_id)
    member = sa.select(schema.vm_group_member.c.vm_id, schema.vm_group_member.c.vm_group_id, sa.literal(0))
    for query in (volumes, nics, member):
        for vm_id, one, other in session.execute(query):
            if vm_id in parts:
                parts[vm_id] += (one, other)
    return {vm_id: tuple(part) for vm_id, part in parts.items()}


def vms_on_hosts(session: Session, vm_ids: Collection[str]) -> tuple[EstateVm, ...]:
    """Return these vms, of those that are on hosts, as `marks` means them: busy with nothing."""
    holding = _holding(session)
    return tuple(EstateVm(needs, needs.vm.drain_policy, vm_id in holding, "") for vm_id, needs in _needs(session, vm_ids).items())


def _layered(session: Session) -> frozenset[str]:
    volume, pool = schema.volume, schema.pool
    query = (
        sa.select(volume.c.vm_id)
        .join(schema.volume_layer, schema.volume_layer.c.volume_id == volume.c.id)
        .join(pool, pool.c.id == volume.c.pool_id)
        .where(volume.c.vm_id.is_not(None), pool.c.is_shared.is_(False))
    )
    return frozenset(session.scalars(query))


def _linked_clones(session: Session) -> dict[str, tuple[str, ...]]:
    base, clone, vm, pool = schema.volume.alias(), schema.volume.alias(), schema.vm, schema.pool
    query = (
        sa.select(base.c.vm_id, vm.c.name)
        .join(base, base.c.id == clone.c.parent_volume_id)
        .join(pool, pool.c.id == base.c.pool_id)
        .join(vm, vm.c.id == clone.c.vm_id)
        .where(base.c.vm_id.is_not(None), base.c.vm_id != clone.c.vm_id, pool.c.is_shared.is_(False))
        .order_by(vm.c.name)
        .distinct()
    )
    found: dict[str, tuple[str, ...]] = {}
    for row in session.execute(query):
        found[row.vm_id] = (*found.get(row.vm_id, ()), row.name)
    return found


def _on_hosts(*columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
    table = schema.vm
    return sa.select(table.c.id, *columns).where(table.c.deleted_at.is_(None), table.c.host_id != "")


def _needs(session: Session, vm_ids: Collection[str]) -> dict[str, VmNeeds]:
    ids, found = sorted(vm_ids), {}
    for start in range(0, len(ids), _CHUNK):
        found.update(fleet.needs_of(session, ids[start : start + _CHUNK]))
    return found


def _holding(session: Session) -> frozenset[str]:
    """Return the vms whose home claim holds something: a stopped vm's does not."""
    claim = schema.claim
    holds = sa.or_(claim.c.vcpus > 0, claim.c.memory_mib > 0, _has_stock())
    return frozenset(session.scalars(sa.select(claim.c.vm_id).where(claim.c.role == "home", holds)))


def _has_stock() -> sa.ColumnElement[bool]:
    """Whether a claim takes of the host's stocks: pinned cpus and huge pages are not among its vcpus and memory."""
    held, claim = schema.claim_stock, schema.claim
    return sa.exists().where(held.c.vm_id == claim.c.vm_id, held.c.host_id == claim.c.host_id)


def _busy(session: Session) -> dict[str, str]:
    """Return what is under way on each subject, of any kind: a backup that runs beside others keeps its vm too."""
    table = schema.operation
    query = sa.select(table.c.subject_id, table.c.kind, table.c.id).where(table.c.state.in_(_LIVE)).order_by(table.c.id)
    return {row.subject_id: f"{row.kind} {row.id}" for row in session.execute(query)}


def migration_samples(session: Session, *, limit: int = 200) -> tuple[tuple[int, float], ...]:
    """Return (MiB of memory, seconds) of the last live migrations without copied disks that were done."""
    operation, vm, volume, pool = schema.operation, schema.vm, schema.volume, schema.pool
    copied = sa.exists().where(volume.c.vm_id == vm.c.id, pool.c.id == volume.c.pool_id, pool.c.is_shared.is_(False))
    query = (
        sa.select(vm.c.memory_mib, operation.c.result)
        .join(vm, vm.c.id == operation.c.subject_id)
        .where(operation.c.kind == "vm.migrate", operation.c.state == "done", ~copied)
        .order_by(operation.c.id.desc())
        .limit(limit)
    )
    found = []
    for row in session.execute(query):
        total_ms = (row.result or {}).get("total_ms")
        if total_ms:
            found.append((int(row.memory_mib), total_ms / 1000))
    return tuple(found)


def usage_since(
    session: Session, metric: str, at: datetime, *, bucket_s: int, subject_ids: Collection[str] | None = None
) -> Mapping[str, list[tuple[datetime, float]]]:
    """Return the means of one metric by subject, oldest first."""
    table = schema.usage_rollup
    query = sa.select(table.c.subject_id, table.c.bucket_at, table.c.mean).where(
        table.c.metric == metric, table.c.bucket_s == bucket_s, table.c.bucket_at >= at
    )
    if subject_ids is not None:
        query = query.where(table.c.subject_id.in_(subject_ids))
    found: dict[str, list[tuple[datetime, float]]] = {}
    for row in session.execute(query.order_by(table.c.bucket_at)):
        found.setdefault(row.subject_id, []).append((row.bucket_at, row.mean))
    return found
