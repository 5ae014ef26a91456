"""Failover in SQL: power devices, the record of each loss, operators' words, and the rows that the leader's loop decides on."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import DesiredPower, HostConnectivity, ObservedState, OperationState
from trimtab_controller.core.model.failover import FailoverControl, FailoverRow, FailoverVmRow, FencePathRow
from trimtab_controller.store import keyset, schema
from trimtab_controller.store.among import among
from trimtab_controller.store.rows import build

CONTROL = "failover"
_SILENT = (HostConnectivity.SUSPECT.value, HostConnectivity.LOST.value, HostConnectivity.FENCED.value)
# As `FencePathRow.is_ready` says it.
IS_READY = sa.and_(
    schema.fence_path.c.tested_at.is_not(None),
    schema.fence_path.c.test_power.in_(("on", "off")),
    schema.fence_path.c.test_message == "",
)
# Its operation has begun, and stands: for room, for a slot, for an operator.
_STANDS = sa.and_(schema.failover_vm.c.state == "starting", schema.failover_vm.c.why != "")
IS_WAITING = sa.or_(schema.failover_vm.c.state == "waiting", _STANDS)
_ENDED = ("stopped", "absent", "crashed")
# Its owner shut it down from the inside, or an operator destroyed it by hand: not failover's to undo.
SHUT_DOWN = ("guest_shutdown", "destroyed")
ON_PURPOSE = (*SHUT_DOWN, "migrated")


SYSTEM = "system:failover"


def _taken_off() -> sa.ColumnElement[bool]:
    vm, stop, later = schema.vm, schema.operation.alias("stop"), schema.operation.alias("later")
    by_others = sa.exists().where(
        later.c.subject_id == vm.c.id, later.c.is_exclusive, later.c.actor != SYSTEM, later.c.created_at >= stop.c.created_at
    )
    stopped = sa.exists().where(stop.c.subject_id == vm.c.id, stop.c.kind == "vm.stop", stop.c.actor == SYSTEM, ~by_others)
    return sa.and_(
        vm.c.ha == "restart",
        vm.c.desired_power == DesiredPower.RUNNING.value,
        vm.c.attention == "",
        vm.c.observed_host_id == vm.c.host_id,
        vm.c.observed_state.in_(_ENDED),
        vm.c.observed_reason.in_(ON_PURPOSE),
        stopped,
    )


# Of a vm that a leader took off its host and that leader's successor finds. Plan: only of those that are off, by ix_operation_subject.
_TAKEN_OFF = _taken_off()


# --- power devices -----------------------------------------------------------------------------------------------------------


def fence_paths(session: Session, host_id: str = "") -> tuple[FencePathRow, ...]:
    """Return the power devices of a host ('' : of all), in order of use."""
    table = schema.fence_path
    query = sa.select(table).order_by(table.c.host_id, table.c.position)
    rows = session.execute(query.where(table.c.host_id == host_id) if host_id else query)
    return tuple(build(FencePathRow, row) for row in rows)


def set_fence_paths(session: Session, host_id: str, paths: Sequence[Mapping[str, Any]], *, now: datetime) -> None:
    """Replace a host's power devices; their tests are forgotten with them, and new ones are wanted."""
    table = schema.fence_path
    session.execute(table.delete().where(table.c.host_id == host_id))
    for position, path in enumerate(paths):
        values = {"host_id": host_id, "position": position, "test_wanted_at": now, "created_at": now}
        session.execute(table.insert().values(**values, **path))


def want_tests(session: Session, host_id: str, *, now: datetime) -> None:
    """Ask the leader to test the power devices of a host ('' : of all) at its next round."""
    table = schema.fence_path
    wanted = table.update().values(test_wanted_at=now)
    session.execute(wanted.where(table.c.host_id == host_id) if host_id else wanted)


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


def write_record(session: Session, host_id: str, *, failover_id: str, now: datetime, **values: Any) -> str:
    """Insert or change the record of the host's present loss; return its id."""
    table = schema.failover
    present = open_record(session, host_id)
    if present is None:
        session.execute(table.insert().values(id=failover_id, host_id=host_id, created_at=now, **{"evidence": [], **values}))
        return failover_id
    session.execute(table.update().where(table.c.id == present.id).values(**values))
    return present.id


def page(session: Session, page: keyset.Page) -> tuple[tuple[FailoverRow, ...], tuple[str, str] | None]:
    table = schema.failover
    filters = {"state": keyset.equals(table.c.state), "host": keyset.named(table.c.host_id, schema.host)}
    found = keyset.fetch(session, sa.select(table), table, page, filters=filters)
    return tuple(build(FailoverRow, row) for row in found.rows), found.next_after


def open_records(session: Session) -> tuple[FailoverRow, ...]:
    """Return the losses of hosts that are not back."""
    table = schema.failover
    rows = session.execute(sa.select(table).where(table.c.state != "returned").order_by(table.c.id))
    return tuple(build(FailoverRow, row) for row in rows)


def count_vms(session: Session, failover_ids: Collection[str]) -> Mapping[str, Mapping[str, int]]:
    """Return for each loss how many of its vms are in each state, as people are shown it."""
    table = schema.failover_vm
    state = sa.case((IS_WAITING, "waiting"), else_=table.c.state).label("shown")
    query = (
        sa.select(table.c.failover_id, state, sa.func.count())
        .where(table.c.failover_id.in_(failover_ids))
        .group_by(table.c.failover_id, state)
    )
    found: dict[str, dict[str, int]] = {failover_id: {} for failover_id in failover_ids}
    for failover_id, state, count in session.execute(query):
        found[failover_id][state] = count
    return found


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


def note_why(session: Session, operation_id: str, why: str) -> None:
    """Record why a recovery that has begun stands; '' once it goes on."""
    table = schema.failover_vm
    session.execute(
        table.update().where(table.c.operation_id == operation_id, table.c.state == "starting").values(why=why[:1000])
    )


def open_starts(session: Session) -> tuple[FailoverVmRow, ...]:
    """Return the vms whose recovery has begun and not ended."""
    table = schema.failover_vm
    return tuple(build(FailoverVmRow, row) for row in session.execute(sa.select(table).where(table.c.state == "starting")))


def open_waits(session: Session, vm_id: str) -> tuple[FailoverVmRow, ...]:
    """Return the losses in which the vm still waits for its restart; a host may be back before its turn has come."""
    table = schema.failover_vm
    rows = session.execute(sa.select(table).where(table.c.vm_id == vm_id, table.c.state == "waiting"))
    return tuple(build(FailoverVmRow, row) for row in rows)


# --- what the loop reads -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptVm:
    """A vm that failover keeps running, with what decides where it may go."""

    id: str
    name: str
    host_id: str
    epoch: int
    project_id: str
    priority: int
    start_delay_s: int
    start_group: str
    start_order: int
    desired_power: str
    ha: str
    observed_state: str
    observed_reason: str
    observed_host_id: str
    attention: str
    has_local_disk: bool
    migrating_to: str
    was_taken_off: bool = False
    """Failover ended it at its home, whose storage is lost, to start it elsewhere; it is off since, and nobody else did anything."""


def _kept() -> sa.Select[Any]:
    vm, volume, pool, migration = schema.vm, schema.volume, schema.pool, schema.migration
    local = (
        sa.select(volume.c.id)
        .join(pool, pool.c.id == volume.c.pool_id)
        .where(volume.c.vm_id == vm.c.id, volume.c.deleted_at.is_(None), pool.c.is_shared.is_(False))
        .exists()
    )
    columns = [vm.c[name] for name in KeptVm.__dataclass_fields__ if name in vm.c]
    return (
        sa.select(
            *columns,
            local.label("has_local_disk"),
            _TAKEN_OFF.label("was_taken_off"),
            sa.func.coalesce(migration.c.target_host_id, "").label("migrating_to"),
        )
        .select_from(vm.join(schema.host, schema.host.c.id == vm.c.host_id).outerjoin(migration, migration.c.vm_id == vm.c.id))
        .where(vm.c.deleted_at.is_(None), vm.c.desired_power != DesiredPower.DELETED.value)
        .order_by(vm.c.id)
    )


def kept_vms(session: Session, *, also: Collection[str] = ()) -> tuple[KeptVm, ...]:
    """Return the vms that failover has to do with now, and those of `also`.

    At home on a host that is not heard from; waiting for or in recovery; migrating; ended alone on a host that lives; taken off a
    host by failover itself; and those of their start groups, for which they may have to wait.
    """
    vm, host = schema.vm, schema.host
    waiting = sa.select(schema.failover_vm.c.vm_id).where(schema.failover_vm.c.state.in_(("waiting", "starting")))
    ended_alone = sa.and_(
        vm.c.ha == "restart",
        vm.c.desired_power == DesiredPower.RUNNING.value,
        vm.c.attention == "",
        vm.c.observed_host_id == vm.c.host_id,
        vm.c.observed_state.in_(_ENDED),
        vm.c.observed_reason.not_in(ON_PURPOSE),
        host.c.connectivity == HostConnectivity.UP.value,
    )
    concerned = sa.or_(
        host.c.connectivity.in_(_SILENT),
        vm.c.id.in_(waiting),
        schema.migration.c.vm_id.is_not(None),
        ended_alone,
        _TAKEN_OFF,
        vm.c.id.in_(also),
    )
    found = tuple(KeptVm(**row._mapping) for row in session.execute(_kept().where(concerned)))
    return (*found, *_beside(session, found))


def _beside(session: Session, found: Sequence[KeptVm]) -> tuple[KeptVm, ...]:
    """Return the kept vms of the start groups of these, without these. Plan: ix_vm_start_group."""
    known = {vm.id for vm in found}
    groups = {(vm.project_id, vm.start_group) for vm in found if vm.start_group and vm.ha == "restart"}
    if not groups:
        return ()
    vm = schema.vm
    members = _kept().where(
        sa.text("start_group != ''"),
        among(vm.c.start_group, {name for _project_id, name in groups}),
        vm.c.ha == "restart",
        vm.c.desired_power == DesiredPower.RUNNING.value,
        vm.c.attention == "",
    )
    rows = (KeptVm(**row._mapping) for row in session.execute(members))
    return tuple(one for one in rows if one.id not in known and (one.project_id, one.start_group) in groups)


def last_started(session: Session, vm_ids: Collection[str]) -> Mapping[str, datetime]:
    """Return when those of the vms that were started by an operation last were. Plan: ix_operation_subject."""
    if not vm_ids:
        return {}
    table = schema.operation
    query = (
        sa.select(table.c.subject_id, sa.func.max(table.c.ended_at))
        .where(
            among(table.c.subject_id, vm_ids),
            table.c.kind.in_(("vm.recover", "vm.start")),
            table.c.state == OperationState.DONE.value,
        )
        .group_by(table.c.subject_id)
    )
    return {vm_id: at for vm_id, at in session.execute(query) if at is not None}


def stranded(session: Session, lost_pools: Collection[tuple[str, str]]) -> frozenset[str]:
    """Return the kept vms that an I/O error paused at home, with disks in one of these pools: (pool, host)."""
    if not lost_pools:
        return frozenset()
    vm, volume = schema.vm, schema.volume
    query = (
        sa.select(vm.c.id, vm.c.host_id, volume.c.pool_id)
        .join(volume, volume.c.vm_id == vm.c.id)
        .where(
            vm.c.host_id.in_({host_id for _pool_id, host_id in lost_pools}),
            volume.c.pool_id.in_({pool_id for pool_id, _host_id in lost_pools}),
            volume.c.deleted_at.is_(None),
            vm.c.deleted_at.is_(None),
            vm.c.ha == "restart",
            vm.c.desired_power == DesiredPower.RUNNING.value,
            vm.c.observed_host_id == vm.c.host_id,
            vm.c.observed_state == ObservedState.PAUSED.value,
            vm.c.observed_reason == "io_error",
        )
    )
    return frozenset(row.id for row in session.execute(query) if (row.pool_id, row.host_id) in lost_pools)


def pools_of(session: Session, vm_ids: Collection[str]) -> Mapping[str, frozenset[str]]:
    """Return in which pools the disks of each of these vms lie."""
    volume, found = schema.volume, defaultdict[str, set[str]](set)
    query = sa.select(volume.c.vm_id, volume.c.pool_id).where(
        among(volume.c.vm_id, sorted(vm_ids)), volume.c.deleted_at.is_(None)
    )
    for row in session.execute(query):
        found[row.vm_id].add(row.pool_id)
    return {vm_id: frozenset(pools) for vm_id, pools in found.items()}


def tombstones(session: Session, vm_ids: Collection[str]) -> frozenset[str]:
    """Return which of these vms were ours and are deleted: their ids are never used again."""
    vm = schema.vm
    query = sa.select(vm.c.id).where(vm.c.id.in_(vm_ids), vm.c.deleted_at.is_not(None))
    return frozenset(session.scalars(query)) if vm_ids else frozenset()


def vms_at_home(session: Session, host_id: str = "") -> tuple[KeptVm, ...]:
    """Return the vms whose home is this host ('' : any), wherever they may be on their way to."""
    query = _kept().where(schema.vm.c.host_id == host_id) if host_id else _kept()
    return tuple(KeptVm(**row._mapping) for row in session.execute(query))


def unprotected(session: Session, *, with_vms_to_restart: bool = False) -> frozenset[str]:
    """Return the hosts that only an operator could prove off: no armed warden, no power device that is ready. On demand, of those the
    ones that are home to a vm with `ha=restart`."""
    host, guard, path, vm = schema.host, schema.host_guard, schema.fence_path, schema.vm
    is_armed = sa.exists().where(guard.c.host_id == host.c.id, guard.c.is_armed)
    has_power = sa.exists().where(path.c.host_id == host.c.id, IS_READY)
    query = sa.select(host.c.id).where(host.c.deleted_at.is_(None), ~is_armed, ~has_power)
    if with_vms_to_restart:
        is_wanted = sa.and_(vm.c.ha == "restart", vm.c.deleted_at.is_(None), vm.c.desired_power != DesiredPower.DELETED.value)
        query = query.where(sa.exists().where(vm.c.host_id == host.c.id, is_wanted))
    return frozenset(session.scalars(query))


def set_fenced(session: Session, host_id: str, *, now: datetime) -> bool:
    """Mark a lost host as fenced; False where it came back or was removed meanwhile."""
    table = schema.host
    changed = session.execute(
        table.update()
        .where(table.c.id == host_id, table.c.connectivity == HostConnectivity.LOST.value, table.c.deleted_at.is_(None))
        .values(connectivity=HostConnectivity.FENCED.value, connectivity_at=now, version=table.c.version + 1)
    )
    return getattr(changed, "rowcount", 0) == 1
