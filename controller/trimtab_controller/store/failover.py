"""Failover in SQL: power devices, the record of each loss, operators' words, and the rows that the leader's loop decides on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import DesiredPower, HostConnectivity
from trimtab_controller.core.model.failover import FailoverControl, FailoverRow, FailoverVmRow, FencePathRow
from trimtab_controller.store import schema
from trimtab_controller.store.rows import build

CONTROL = "failover"
_SILENT = (HostConnectivity.SUSPECT.value, HostConnectivity.LOST.value, HostConnectivity.FENCED.value)


# --- power devices -----------------------------------------------------------------------------------------------------------


def fence_paths(session: Session, host_id: str = "") -> tuple[FencePathRow, ...]:
    """Return the power devices of a host ('' : of all), in order of use."""
    table = schema.fence_path
    query = sa.select(table).order_by(table.c.host_id, table.c.position)
    rows = session.execute(query.where(table.c.host_id == host_id) if host_id else query)
    return tuple(build(FencePathRow, row) for row in rows)


def set_fence_paths(session: Session, host_id: str, paths: Sequence[Mapping[str, Any]], *, now: datetime) -> None:
    """Replace a host's power devices; their tests are forgotten with them."""
    table = schema.fence_path
    session.execute(table.delete().where(table.c.host_id == host_id))
    for position, path in enumerate(paths):
        session.execute(table.insert().values(host_id=host_id, position=position, created_at=now, **path))


def record_test(session: Session, host_id: str, name: str, *, power: str, message: str, now: datetime) -> None:
    table = schema.fence_path
    session.execute(
        table.update()
        .where(table.c.host_id == host_id, table.c.name == name)
        .values(tested_at=now, test_power=power, test_message=message[:400])
    )


# --- operators' words --------------------------------------------------------------------------------------------------------


def control(session: Session) -> FailoverControl:
    table = schema.failover_control
    row = session.execute(sa.select(table).where(table.c.name == CONTROL)).one_or_none()
    return build(FailoverControl, row) if row else FailoverControl(released={}, confirmed_off={})


def set_control(session: Session, *, now: datetime, **changes: Any) -> FailoverControl:
    """Change what operators said, in one row that is made on its first use."""
    table = schema.failover_control
    changed = session.execute(table.update().where(table.c.name == CONTROL).values(updated_at=now, **changes))
    if getattr(changed, "rowcount", 0) == 0:
        values = {"is_paused": False, "frozen": "", "released": {}, "confirmed_off": {}, **changes}
        session.execute(table.insert().values(name=CONTROL, updated_at=now, **values))
    return control(session)


# --- records -------------------------------------------------------------------------------------------------------------------


def open_record(session: Session, host_id: str) -> FailoverRow | None:
    """Return the record of the host's present loss."""
    table = schema.failover
    row = session.execute(sa.select(table).where(table.c.host_id == host_id, table.c.state != "returned")).one_or_none()
    return build(FailoverRow, row) if row else None


def get_record(session: Session, failover_id: str) -> FailoverRow | None:
    table = schema.failover
    row = session.execute(sa.select(table).where(table.c.id == failover_id)).one_or_none()
    return build(FailoverRow, row) if row else None


def records(session: Session, *, limit: int, after_id: str = "") -> tuple[FailoverRow, ...]:
    """Return losses, the newest first."""
    table = schema.failover
    query = sa.select(table).order_by(table.c.id.desc()).limit(limit)
    rows = session.execute(query.where(table.c.id < after_id) if after_id else query)
    return tuple(build(FailoverRow, row) for row in rows)


def write_record(session: Session, host_id: str, *, failover_id: str, now: datetime, **values: Any) -> str:
    """Insert or change the record of the host's present loss; return its id."""
    table = schema.failover
    present = open_record(session, host_id)
    if present is None:
        session.execute(table.insert().values(id=failover_id, host_id=host_id, created_at=now, **{"evidence": [], **values}))
        return failover_id
    session.execute(table.update().where(table.c.id == present.id).values(**values))
    return present.id


def vms_of(session: Session, failover_id: str) -> tuple[FailoverVmRow, ...]:
    table = schema.failover_vm
    rows = session.execute(sa.select(table).where(table.c.failover_id == failover_id).order_by(table.c.created_at, table.c.vm_id))
    return tuple(build(FailoverVmRow, row) for row in rows)


def write_vm(session: Session, failover_id: str, vm_id: str, *, now: datetime, **values: Any) -> None:
    """Insert or change what became of one vm in this loss."""
    table = schema.failover_vm
    where = (table.c.failover_id == failover_id, table.c.vm_id == vm_id)
    changed = session.execute(table.update().where(*where).values(**values))
    if getattr(changed, "rowcount", 0) == 0:
        session.execute(table.insert().values(failover_id=failover_id, vm_id=vm_id, created_at=now, **values))


def open_starts(session: Session) -> tuple[FailoverVmRow, ...]:
    """Return the vms whose recovery has begun and not ended."""
    table = schema.failover_vm
    return tuple(build(FailoverVmRow, row) for row in session.execute(sa.select(table).where(table.c.state == "starting")))


# --- what the loop reads -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptVm:
    """A vm that failover keeps running, with what decides where it may go."""

    id: str
    host_id: str
    epoch: int
    priority: int
    desired_power: str
    ha: str
    has_local_disk: bool
    migrating_to: str


def kept_vms(session: Session) -> tuple[KeptVm, ...]:
    """Return the vms at home on hosts that are not heard from, and those whose recovery waits."""
    vm, host, volume, pool, migration = schema.vm, schema.host, schema.volume, schema.pool, schema.migration
    local = (
        sa.select(volume.c.id)
        .join(pool, pool.c.id == volume.c.pool_id)
        .where(volume.c.vm_id == vm.c.id, volume.c.deleted_at.is_(None), pool.c.is_shared.is_(False))
        .exists()
    )
    waiting = sa.select(schema.failover_vm.c.vm_id).where(schema.failover_vm.c.state.in_(("waiting", "starting")))
    query = (
        sa.select(
            vm.c.id,
            vm.c.host_id,
            vm.c.epoch,
            vm.c.priority,
            vm.c.desired_power,
            vm.c.ha,
            local.label("has_local_disk"),
            sa.func.coalesce(migration.c.target_host_id, "").label("migrating_to"),
        )
        .select_from(vm.join(host, host.c.id == vm.c.host_id).outerjoin(migration, migration.c.vm_id == vm.c.id))
        .where(
            vm.c.deleted_at.is_(None),
            vm.c.desired_power != DesiredPower.DELETED.value,
            sa.or_(host.c.connectivity.in_(_SILENT), vm.c.id.in_(waiting), migration.c.vm_id.is_not(None)),
        )
        .order_by(vm.c.id)
    )
    return tuple(KeptVm(**row._mapping) for row in session.execute(query))


def set_fenced(session: Session, host_id: str, *, now: datetime) -> bool:
    """Mark a lost host as fenced; False where it came back or was removed meanwhile."""
    table = schema.host
    changed = session.execute(
        table.update()
        .where(table.c.id == host_id, table.c.connectivity == HostConnectivity.LOST.value, table.c.deleted_at.is_(None))
        .values(connectivity=HostConnectivity.FENCED.value, connectivity_at=now, version=table.c.version + 1)
    )
    return getattr(changed, "rowcount", 0) == 1
