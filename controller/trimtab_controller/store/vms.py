"""Vms and their nics in SQL."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import DesiredPower, ObservedState
from trimtab_controller.core.model import Nic, Vm
from trimtab_controller.core.resize import NOTHING, Shape, charged_for, shape_of
from trimtab_controller.store import project_quota, schema, secgroups
from trimtab_controller.store.among import among_asked
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import AlreadyExists, NotFound

_table = schema.vm
_columns = columns_of(_table, Vm)

# Every step of every saga of a vm runs these: built once, since to build a statement costs several times its execution.
_BY_ID = sa.select(*_columns).where(_table.c.id == sa.bindparam("vm_id"))
_LIVE_BY_NAME = sa.select(*_columns).where(
    _table.c.project_id == sa.bindparam("project"), _table.c.name == sa.bindparam("wanted"), _table.c.deleted_at.is_(None)
)
_LIVE_BY_ID = sa.select(*_columns).where(
    _table.c.id == sa.bindparam("wanted"), _table.c.project_id == sa.bindparam("project"), _table.c.deleted_at.is_(None)
)
_DELETED = (
    sa.select(*_columns)
    .where(
        _table.c.project_id == sa.bindparam("project"),
        sa.or_(_table.c.name == sa.bindparam("wanted"), _table.c.id == sa.bindparam("wanted")),
        _table.c.deleted_at.is_not(None),
        _table.c.purged_at.is_(None),
    )
    .order_by(_table.c.deleted_at.desc())
    .limit(1)
)
_INSERT = _table.insert().returning(*_columns)
_WRITE_BY_ID = _table.update().where(_table.c.id == sa.bindparam("vm_id"))
_WRITE_NEXT_VERSION = _WRITE_BY_ID.values(version=_table.c.version + 1)
_SEEN = sa.select(_table.c.observed_state, _table.c.observed_reason, _table.c.observed_host_id, _table.c.observed_at).where(
    _table.c.id == sa.bindparam("vm_id")
)
_NICS = sa.select(schema.nic).where(among_asked(schema.nic.c.vm_id, "vm_ids")).order_by(schema.nic.c.nic_index)
_ADDRESSES = (
    sa.select(schema.nic_address)
    .join(schema.nic, schema.nic.c.id == schema.nic_address.c.nic_id)
    .where(among_asked(schema.nic.c.vm_id, "vm_ids"))
    .order_by(schema.nic_address.c.address)
)
_ADDRESSES_OF_VMS = (
    sa.select(schema.nic.c.vm_id, schema.nic_address.c.address, schema.nic_address.c.prefix_length)
    .join(schema.nic, schema.nic.c.id == schema.nic_address.c.nic_id)
    .where(among_asked(schema.nic.c.vm_id, "vm_ids"))
    .order_by(schema.nic.c.nic_index, schema.nic_address.c.address)
)


def from_row(row: sa.Row[Any]) -> Vm:
    return build(Vm, row)


def insert(session: Session, **values: Any) -> Vm:
    """Insert a vm row from column values. AlreadyExists where its name is taken among live vms of the project."""
    try:
        with session.begin_nested():
            row = session.execute(_INSERT, values).one()
    except IntegrityError as error:
        if find(session, values["project_id"], values["name"]) is None:
            raise
        raise AlreadyExists(
            "vm-exists", f"vm {values['name']} exists already in this project; choose another name", name=values["name"]
        ) from error
    return from_row(row)


def get(session: Session, vm_id: str) -> Vm:
    """Return the vm, deleted ones too: their rows are tombstones."""
    row = session.execute(_BY_ID, {"vm_id": vm_id}).one_or_none()
    if row is None:
        raise NotFound("vm-not-found", f"no vm {vm_id}")
    return from_row(row)


def find(session: Session, project_id: str, name_or_id: str, *, with_deleted: bool = False) -> Vm | None:
    """Return the vm of this name or id, live before deleted, latest deleted first; None where the project has none.

    Plans: uq_vm_name_live, then the key. One statement for both reads every vm; so does that for deleted ones, which is rare.
    """
    asked = {"project": project_id, "wanted": name_or_id}
    for query in (_LIVE_BY_NAME, _LIVE_BY_ID, *((_DELETED,) if with_deleted else ())):
        row = session.execute(query, asked).one_or_none()
        if row is not None:
            return from_row(row)
    return None


def page(
    session: Session,
    *,
    limit: int,
    after_name: str = "",
    project_ids: Sequence[str] | None = None,
    host_id: str = "",
    observed_state: str = "",
    with_deleted: bool = False,
) -> tuple[Vm, ...]:
    """Return up to `limit` vms by name, after `after_name`."""
    query = sa.select(*_columns).order_by(_table.c.name, _table.c.id).limit(limit)
    if after_name:
        query = query.where(_table.c.name > after_name)
    if project_ids is not None:
        query = query.where(_table.c.project_id.in_(project_ids))
    if host_id:
        query = query.where(_table.c.host_id == host_id)
    if observed_state:
        query = query.where(_table.c.observed_state == observed_state)
    query = query.where(_table.c.purged_at.is_(None)) if with_deleted else query.where(_table.c.deleted_at.is_(None))
    return tuple(from_row(row) for row in session.execute(query))


def with_local_disks(session: Session, *, limit: int) -> tuple[Vm, ...]:
    """Return live vms at home on some host, with a disk that they write to in a pool which only that host reaches."""
    volume, pool = schema.volume, schema.pool
    local = (
        sa.select(volume.c.id)
        .join(pool, pool.c.id == volume.c.pool_id)
        .where(volume.c.vm_id == _table.c.id, volume.c.deleted_at.is_(None), pool.c.is_shared.is_(False))
        .where(volume.c.is_read_only.is_(False))
        .exists()
    )
    is_home = (_table.c.deleted_at.is_(None), sa.func.coalesce(_table.c.host_id, "") != "")
    query = sa.select(*_columns).where(*is_home, local).order_by(_table.c.id).limit(limit)
    return tuple(from_row(row) for row in session.execute(query))


def update(session: Session, vm_id: str, **values: Any) -> None:
    """Write column values and raise the version."""
    session.execute(_WRITE_NEXT_VERSION, {"vm_id": vm_id, **values})


def set_desired(session: Session, vm_id: str, power: DesiredPower) -> None:
    update(session, vm_id, desired_power=power.value)


def observe(
    session: Session,
    vm_id: str,
    *,
    host_id: str,
    state: ObservedState,
    reason: str,
    at: datetime,
    addresses: Sequence[str] | None = None,
) -> bool:
    """Record what was seen of the vm unless something newer was; return whether the state changed."""
    before = session.execute(_SEEN, {"vm_id": vm_id}).one_or_none()
    if before is None or (before.observed_at is not None and before.observed_at > at):
        return False
    values: dict[str, Any] = {"observed_at": at}
    seen = (state.value, reason, host_id)
    has_changed = seen != (before.observed_state, before.observed_reason, before.observed_host_id)
    if has_changed:
        values |= {"observed_state": state.value, "observed_reason": reason, "observed_host_id": host_id}
    if addresses is not None:
        values["observed_addresses"] = list(addresses)
    session.execute(_WRITE_NEXT_VERSION if has_changed else _WRITE_BY_ID, {"vm_id": vm_id, **values})
    return has_changed


# --- nics ----------------------------------------------------------------------------------------------------------------


def nics_of(session: Session, vm_ids: Sequence[str]) -> dict[str, tuple[Nic, ...]]:
    """Return each vm's nics in order, with their declared addresses; two queries for any number of vms."""
    of = {"vm_ids": list(vm_ids)}
    addresses: dict[str, list[str]] = {}
    for row in session.execute(_ADDRESSES, of):
        addresses.setdefault(row.nic_id, []).append(f"{row.address}/{row.prefix_length}")
    found: dict[str, list[Nic]] = {vm_id: [] for vm_id in vm_ids}
    for row in session.execute(_NICS, of):
        found[row.vm_id].append(build(Nic, row, addresses=tuple(addresses.get(row.id, ()))))
    return {vm_id: tuple(nics) for vm_id, nics in found.items()}


def declared_addresses(session: Session, vm_ids: Sequence[str]) -> dict[str, list[str]]:
    """Return the addresses declared for the nics of those vms that have some, with prefix length; one query."""
    found: dict[str, list[str]] = {}
    for row in session.execute(_ADDRESSES_OF_VMS, {"vm_ids": list(vm_ids)}) if vm_ids else ():
        found.setdefault(row.vm_id, []).append(f"{row.address}/{row.prefix_length}")
    return found


def delete_nics(session: Session, vm_id: str) -> None:
    """Free the vm's MACs and addresses, and take it out of its security groups."""
    ids = sa.select(schema.nic.c.id).where(schema.nic.c.vm_id == vm_id)
    session.execute(schema.nic_address.delete().where(schema.nic_address.c.nic_id.in_(ids)))
    session.execute(schema.nic.delete().where(schema.nic.c.vm_id == vm_id))
    secgroups.forget(session, vm_id)


def delete_nic(session: Session, nic_id: str) -> None:
    """Free one nic's MAC and addresses; nothing where there is no such nic."""
    session.execute(schema.nic_address.delete().where(schema.nic_address.c.nic_id == nic_id))
    session.execute(schema.nic.delete().where(schema.nic.c.id == nic_id))


def charge_project(session: Session, vm: Vm, *, disk_bytes: int, sign: int) -> None:
    """Give back (sign -1) what a vm counts for in its project's quota. Charging with a quota check: `services/quota.py`."""
    table, shape = schema.project, charged_for(vm)
    session.execute(
        table.update()
        .where(table.c.id == vm.project_id)
        .values(
            vms_used=table.c.vms_used + sign,
            vcpus_used=table.c.vcpus_used + sign * shape.vcpus,
            memory_mib_used=table.c.memory_mib_used + sign * shape.memory_mib,
            disk_bytes_used=table.c.disk_bytes_used + sign * disk_bytes,
        )
    )


def set_shape(session: Session, vm: Vm, shape: Shape, *, left: Shape = NOTHING) -> None:
    """Write the shape that the vm has from now on and what is left for its next stop, and charge its project for that instead.

    Never more than it is charged for: a greater wish was charged, within the quota, when it was accepted (`services/vm_resize.py`).
    """
    after = shape.at_least(left)
    freed = charged_for(vm).minus(after)
    update(
        session,
        vm.id,
        vcpus=shape.vcpus,
        memory_mib=shape.memory_mib,
        vcpus_max=max(vm.vcpus_max, shape.vcpus),
        memory_max_mib=max(vm.memory_max_mib, shape.memory_mib),
        next_vcpus=left.vcpus,
        next_memory_mib=left.memory_mib,
    )
    project_quota.lower_used(session, vm.project_id, freed.as_json())


def set_next_shape(session: Session, vm: Vm, left: Shape) -> None:
    """Write what waits for the vm's next stop, and charge its project for that instead."""
    freed = charged_for(vm).minus(shape_of(vm).at_least(left))
    update(session, vm.id, next_vcpus=left.vcpus, next_memory_mib=left.memory_mib)
    project_quota.lower_used(session, vm.project_id, freed.as_json())
