"""Hosts and their classes in SQL: membership, connectivity, limits. What hosts report: `host_reports.py`; tokens: `host_tokens.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trimtab_controller.core import cpu_sets
from trimtab_controller.core.behind import NUMBERS_AHEAD
from trimtab_controller.core.lifecycle import UNHEARD, HostConnectivity
from trimtab_controller.core.model import Host, HostClass
from trimtab_controller.store import inventories, schema
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.errors import AlreadyExists, Conflict, NotFound
from trimtab_protos.messages import Inventory

_table = schema.host
_classes = schema.host_class
# Inventories are kilobytes of JSON each and rarely change: they are read apart, once per digest.
_columns = [column for column in columns_of(_table, Host) if column.key != "inventory"] + [_table.c.inventory_digest]
# Each placement round reads all of them.
_LIVE = sa.select(*_columns).where(_table.c.deleted_at.is_(None)).order_by(_table.c.name, _table.c.id)
# Before every command to a host.
_AGENT = sa.select(_table.c.agent_address, _table.c.incarnation, _table.c.lease_number).where(
    _table.c.id == sa.bindparam("host_id")
)

DEFAULT_CLASS = "default"


def get(session: Session, host_id: str) -> Host:
    """Return the host, a removed one too: its row is a tombstone."""
    found = _select(session, _table.c.id == host_id)
    if not found:
        raise NotFound("host-not-found", f"no host {host_id}")
    return found[0]


def reach_agent(session: Session, host_id: str) -> tuple[str, str, int]:
    """Return (address, incarnation, lease number): where the host's agent is and what commands to it must carry."""
    row = session.execute(_AGENT, {"host_id": host_id}).one_or_none()
    if row is None:
        raise NotFound("host-not-found", f"no host {host_id}")
    return row.agent_address, row.incarnation, row.lease_number


def find(session: Session, name_or_id: str) -> Host | None:
    """Return the live host of this name or id."""
    found = _select(session, sa.or_(_table.c.name == name_or_id, _table.c.id == name_or_id), _table.c.deleted_at.is_(None))
    return found[0] if found else None


def live(session: Session, host_ids: Sequence[str] | None = None) -> tuple[Host, ...]:
    """Return the live hosts (of these ids) by name."""
    if host_ids is None:
        return _read(session, _LIVE)
    return _select(session, _table.c.deleted_at.is_(None), _table.c.id.in_(host_ids))


def silent(session: Session) -> tuple[Host, ...]:
    """Return the live hosts that are not heard from, by name: a few of many."""
    return _select(session, _table.c.deleted_at.is_(None), _table.c.connectivity.in_([one.value for one in UNHEARD]))


def page(
    session: Session,
    *,
    limit: int,
    after_name: str = "",
    connectivity: str = "",
    host_class_id: str = "",
    is_cordoned: bool | None = None,
) -> tuple[Host, ...]:
    """Return up to `limit` live hosts by name, after `after_name`."""
    conditions = [_table.c.deleted_at.is_(None), _table.c.name > after_name]
    if connectivity:
        conditions.append(_table.c.connectivity == connectivity)
    if host_class_id:
        conditions.append(_table.c.host_class_id == host_class_id)
    if is_cordoned is not None:
        conditions.append(_table.c.is_cordoned == is_cordoned)
    return _select(session, *conditions, limit=limit)


def is_live(session: Session, host_id: str) -> bool:
    query = sa.select(_table.c.id).where(_table.c.id == host_id, _table.c.deleted_at.is_(None))
    return session.execute(query).one_or_none() is not None


def insert(
    session: Session,
    *,
    host_id: str,
    name: str,
    host_class_id: str,
    agent_address: str,
    migration_address: str,
    machine_id: str,
    smbios_uuid: str,
    now: datetime,
) -> Host:
    """Insert a host that has joined and not yet been heard from. AlreadyExists names what a live host holds already."""
    values = {
        "id": host_id,
        "name": name,
        "host_class_id": host_class_id,
        "labels": {},
        "agent_address": agent_address,
        "migration_address": migration_address,
        "machine_id": machine_id,
        "smbios_uuid": smbios_uuid,
        "connectivity": HostConnectivity.NEW.value,
        "connectivity_at": now,
        "created_at": now,
    }
    try:
        with session.begin_nested():
            session.execute(_table.insert().values(**values))
    except IntegrityError as error:
        taken = holders(session, name=name, machine_id=machine_id, smbios_uuid=smbios_uuid)
        if not taken:
            raise
        what, holder = next(iter(taken.items()))
        raise AlreadyExists("host-taken", f"the {what} belongs to host {holder.name} already", field=what) from error
    return get(session, host_id)


def holders(session: Session, *, name: str, machine_id: str, smbios_uuid: str) -> dict[str, Host]:
    """Return which live hosts hold the name, the machine-id and the SMBIOS UUID already."""
    found = {}
    for what, column, value in (
        ("name", _table.c.name, name),
        ("machine_id", _table.c.machine_id, machine_id),
        ("smbios_uuid", _table.c.smbios_uuid, smbios_uuid),
    ):
        hosts = _select(session, column == value, _table.c.deleted_at.is_(None))
        if hosts:
            found[what] = hosts[0]
    return found


def update(session: Session, host_id: str, *, expected_version: int | None = None, **values: Any) -> Host:
    """Write column values that users see and raise the version. Conflict("stale-etag") where it moved on."""
    conditions = [_table.c.id == host_id, _table.c.deleted_at.is_(None)]
    if expected_version is not None:
        conditions.append(_table.c.version == expected_version)
    try:
        with session.begin_nested():
            changed = session.execute(_table.update().where(*conditions).values(version=_table.c.version + 1, **values))
    except IntegrityError as error:
        if "name" not in values or find(session, values["name"]) is None:
            raise
        raise AlreadyExists("host-taken", f"host {values['name']} exists already", field="name") from error
    if getattr(changed, "rowcount", 0) != 1:
        get(session, host_id)
        raise Conflict("stale-etag", "the host changed since it was read; read it again", host_id=host_id)
    return get(session, host_id)


def mark_deleted(session: Session, host_id: str, *, now: datetime) -> bool:
    """Turn a live host into a tombstone; False where it is one already."""
    changed = session.execute(
        _table.update()
        .where(_table.c.id == host_id, _table.c.deleted_at.is_(None))
        .values(deleted_at=now, version=_table.c.version + 1)
    )
    return getattr(changed, "rowcount", 0) == 1


# --- sessions and connectivity ---------------------------------------------------------------------------------------------


def open_session(
    session: Session,
    host_id: str,
    *,
    incarnation: str,
    boot_id: str,
    agent_address: str,
    now: datetime,
    gateway_id: str = "",
    held_lease_number: int = 0,
) -> tuple[int, HostConnectivity]:
    """Raise the host's lease number for a new session and mark it up; return the number and what it was before.

    NotFound where the host was removed. The number is committed before the agent is welcomed: any older session, on whatever
    gateway, is from then on the older one. `held_lease_number`: the highest that the agent knows of; see `_above`.
    """
    before = session.execute(
        sa.select(_table.c.connectivity).where(_table.c.id == host_id, _table.c.deleted_at.is_(None)).with_for_update()
    ).scalar_one_or_none()
    if before is None:
        raise NotFound("host-not-found", "this host is no member of the fleet (any more); join it again", host_id=host_id)
    values: dict[str, Any] = {
        "lease_number": _above(held_lease_number) + 1,
        "incarnation": incarnation,
        "boot_id": boot_id,
        "gateway_id": gateway_id,
        "connectivity": HostConnectivity.UP.value,
    }
    if before != HostConnectivity.UP.value:
        values |= {"connectivity_at": now, "version": _table.c.version + 1}
    if agent_address:
        values["agent_address"] = agent_address
    number = session.execute(
        _table.update().where(_table.c.id == host_id).values(**values).returning(_table.c.lease_number)
    ).scalar_one()
    return int(number), HostConnectivity(before)


def raise_lease_number(session: Session, host_id: str, *, held: int) -> int:
    """Give the host's session a number above the one that its agent holds, and return it."""
    raised = _table.update().where(_table.c.id == host_id).values(lease_number=_above(held) + 1).returning(_table.c.lease_number)
    return int(session.execute(raised).scalar_one())


def _above(held: int) -> sa.ColumnElement[int]:
    """Return what the next number is counted from: ours, or far above the agent's where it knows a higher one.

    Then our row is from the past, and more numbers may have been given since than the agent heard of: a Welcome that never arrived, a
    fence intent that forbids leases up to the row's number of then. An agent takes no lease under a number below its own, and its
    beacon none that is forbidden.
    """
    return sa.case((_table.c.lease_number < held, held + NUMBERS_AHEAD), else_=_table.c.lease_number)


def change_connectivity(
    session: Session,
    host_id: str,
    *,
    lease_number: int,
    allowed_from: Sequence[HostConnectivity],
    to: HostConnectivity,
    now: datetime,
) -> bool:
    """Write a transition seen by the session of `lease_number`; False where a newer session or the engine knows better."""
    changed = session.execute(
        _table.update()
        .where(
            _table.c.id == host_id,
            _table.c.lease_number == lease_number,
            _table.c.connectivity.in_([one.value for one in allowed_from]),
            _table.c.deleted_at.is_(None),
        )
        .values(connectivity=to.value, connectivity_at=now, version=_table.c.version + 1)
    )
    return getattr(changed, "rowcount", 0) == 1


def lease_numbers(session: Session, host_ids: Sequence[str]) -> dict[str, int]:
    """Return the present lease number of each of these hosts that is still a member."""
    query = sa.select(_table.c.id, _table.c.lease_number).where(_table.c.id.in_(host_ids), _table.c.deleted_at.is_(None))
    return {row.id: int(row.lease_number) for row in session.execute(query)}


def member_ids(session: Session) -> frozenset[str]:
    return frozenset(session.scalars(sa.select(_table.c.id).where(_table.c.deleted_at.is_(None))))


@dataclass(frozen=True, slots=True)
class Standing:
    """What failover asks of each host each second, and nothing more."""

    id: str
    name: str
    connectivity: HostConnectivity
    boot_id: str
    is_cordoned: bool
    lease_number: int


_STANDINGS = sa.select(*columns_of(_table, Standing)).where(_table.c.deleted_at.is_(None))


def standings(session: Session) -> tuple[Standing, ...]:
    """Return how every live host stands."""
    return tuple(
        Standing(host_id, name, HostConnectivity(connectivity), boot_id, is_cordoned, lease_number)
        for host_id, name, connectivity, boot_id, is_cordoned, lease_number in session.execute(_STANDINGS)
    )


@dataclass(frozen=True, slots=True)
class Heard:
    """A host that some gateway heard, or has not given up yet."""

    host_id: str
    lease_number: int
    connectivity: HostConnectivity
    # With which its newest session is, or was.
    gateway_id: str


def heard(session: Session) -> tuple[Heard, ...]:
    """Return every live host that SQL calls up or suspect."""
    columns = (_table.c.id, _table.c.lease_number, _table.c.connectivity, _table.c.gateway_id)
    states = (HostConnectivity.UP.value, HostConnectivity.SUSPECT.value)
    query = sa.select(*columns).where(_table.c.connectivity.in_(states), _table.c.deleted_at.is_(None))
    return tuple(
        Heard(row.id, int(row.lease_number), HostConnectivity(row.connectivity), row.gateway_id) for row in session.execute(query)
    )


def session_gateways(session: Session) -> Mapping[str, str]:
    """Return the gateway of each live host's newest session."""
    query = sa.select(_table.c.id, _table.c.gateway_id).where(_table.c.deleted_at.is_(None))
    return {row.id: row.gateway_id for row in session.execute(query)}


# --- classes and limits --------------------------------------------------------------------------------------------------


def get_class(session: Session, host_class_id: str) -> HostClass:
    row = session.execute(sa.select(_classes).where(_classes.c.id == host_class_id)).one_or_none()
    if row is None:
        raise NotFound("host-class-not-found", f"no host class {host_class_id}")
    return build(HostClass, row)


def find_class(session: Session, name_or_id: str) -> HostClass | None:
    query = sa.select(_classes).where(
        sa.or_(_classes.c.name == name_or_id, _classes.c.id == name_or_id), _classes.c.deleted_at.is_(None)
    )
    row = session.execute(query).one_or_none()
    return build(HostClass, row) if row else None


def classes(session: Session) -> tuple[HostClass, ...]:
    """Return every live class by name."""
    query = sa.select(_classes).where(_classes.c.deleted_at.is_(None)).order_by(_classes.c.name)
    return tuple(build(HostClass, row) for row in session.execute(query))


def insert_class(session: Session, *, host_class_id: str, name: str, now: datetime, **values: Any) -> HostClass:
    """Insert a class from column values; AlreadyExists where the name is taken."""
    try:
        with session.begin_nested():
            session.execute(_classes.insert().values(id=host_class_id, name=name, created_at=now, **values))
    except IntegrityError as error:
        if find_class(session, name) is None:
            raise
        raise AlreadyExists("host-class-exists", f"host class {name} exists already", name=name) from error
    return get_class(session, host_class_id)


def update_class(session: Session, host_class_id: str, *, expected_version: int | None = None, **values: Any) -> HostClass:
    """Write column values, raise the version, and give every member its new limits. Conflict("stale-etag") as for hosts."""
    conditions = [_classes.c.id == host_class_id, _classes.c.deleted_at.is_(None)]
    if expected_version is not None:
        conditions.append(_classes.c.version == expected_version)
    changed = session.execute(_classes.update().where(*conditions).values(version=_classes.c.version + 1, **values))
    if getattr(changed, "rowcount", 0) != 1:
        get_class(session, host_class_id)
        raise Conflict("stale-etag", "the host class changed since it was read; read it again", host_class_id=host_class_id)
    host_class = get_class(session, host_class_id)
    for member in _select(session, _table.c.host_class_id == host_class_id, _table.c.deleted_at.is_(None)):
        if member.inventory is not None:
            set_limits(session, member.id, member.inventory, host_class)
    return host_class


def delete_class(session: Session, host_class_id: str, *, now: datetime) -> None:
    """Delete a class without members; Conflict where it has any, or where it is the default."""
    host_class = get_class(session, host_class_id)
    if host_class.name == DEFAULT_CLASS:
        raise Conflict("host-class-is-default", "the default class stays: new hosts get it")
    members = _select(session, _table.c.host_class_id == host_class_id, _table.c.deleted_at.is_(None))
    if members:
        names = ", ".join(host.name for host in members[:5])
        raise Conflict("host-class-in-use", f"host class {host_class.name} has members: {names}", members=len(members))
    session.execute(_classes.update().where(_classes.c.id == host_class_id).values(deleted_at=now))


def limits_of(inventory: Inventory, host_class: HostClass, *, dedicated_cpus: int = 0) -> tuple[int, int]:
    """Return what a host of this class offers: (vcpus, MiB of memory), without cpus set aside and memory that is huge pages."""
    vcpus = (inventory.cpus - dedicated_cpus) * host_class.vcpu_ratio_permille // 1000
    huge_kib = sum(size * count for cell in inventory.numa_cells for size, count in cell.huge_pages.items())
    ordinary_mib = inventory.memory_mib - (huge_kib >> 10) - host_class.memory_reserve_mib
    memory_mib = max(0, ordinary_mib) * host_class.memory_ratio_permille // 1000
    return max(0, vcpus), memory_mib


def set_limits(session: Session, host_id: str, inventory: Inventory, host_class: HostClass) -> None:
    """Write the limits, never below what is claimed: guests that run there do not vanish when a class gets stricter."""
    set_aside = session.scalar(sa.select(_table.c.dedicated_cpus).where(_table.c.id == host_id)) or ""
    dedicated_cpus = len(cpu_sets.parse(set_aside, field="dedicated_cpus"))
    vcpus, memory_mib = limits_of(inventory, host_class, dedicated_cpus=dedicated_cpus)
    session.execute(
        _table.update()
        .where(_table.c.id == host_id)
        .values(
            vcpus_limit=sa.case((_table.c.vcpus_claimed > vcpus, _table.c.vcpus_claimed), else_=vcpus),
            memory_limit_mib=sa.case((_table.c.memory_claimed_mib > memory_mib, _table.c.memory_claimed_mib), else_=memory_mib),
        )
    )


def _select(session: Session, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> tuple[Host, ...]:
    query = sa.select(*_columns).where(*conditions).order_by(_table.c.name, _table.c.id)
    return _read(session, query.limit(limit) if limit is not None else query)


def _read(session: Session, query: sa.Select[Any]) -> tuple[Host, ...]:
    rows = session.execute(query).all()
    known = {row.id: inventories.cached(row.id, row.inventory_digest) for row in rows if row.inventory_digest}
    unread = [host_id for host_id, inventory in known.items() if inventory is None]
    known.update(_read_inventories(session, unread))
    return tuple(_host(row, known.get(row.id)) for row in rows)


def _read_inventories(session: Session, host_ids: Sequence[str]) -> dict[str, Inventory | None]:
    found: dict[str, Inventory | None] = {}
    for start in range(0, len(host_ids), 500):
        query = sa.select(_table.c.id, _table.c.inventory, _table.c.inventory_digest)
        for row in session.execute(query.where(_table.c.id.in_(host_ids[start : start + 500]))):
            if row.inventory is not None:
                found[row.id] = inventory = inventories.from_json(row.inventory)
                inventories.remember(row.id, row.inventory_digest, inventory)
    return found


def _host(row: sa.Row[Any] | Mapping[str, Any], inventory: Inventory | None) -> Host:
    return build(Host, row, inventory=inventory)
