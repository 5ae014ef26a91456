"""Lists of hosts, classes and join tokens for users. Membership, writes and limits: `hosts.py`, `host_tokens.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.architectures import HostMachines
from trimtab_controller.core.model import Host, HostClass
from trimtab_controller.store import host_tokens, hosts, keyset, schema
from trimtab_controller.store.rows import build, columns_of

_table = schema.host
_class = schema.host_class

HOST_FILTERS: keyset.Filters = {
    "name": keyset.equals(_table.c.name),
    "connectivity": keyset.equals(_table.c.connectivity),
    "host_class": keyset.named(_table.c.host_class_id, schema.host_class),
    "is_cordoned": keyset.is_true(_table.c.is_cordoned, "is_cordoned"),
}
CLASS_FILTERS: keyset.Filters = {"name": keyset.equals(_class.c.name), "policy": keyset.equals(_class.c.policy)}
TOKEN_FILTERS: keyset.Filters = {"name": keyset.equals(schema.host_token.c.name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCounts:
    """What is on a host."""

    vms: int
    vms_running: int


def page(session: Session, page: keyset.Page) -> tuple[tuple[Host, ...], tuple[str, str] | None]:
    columns = (_table.c.id, _table.c.name, _table.c.created_at)
    found = keyset.fetch(session, sa.select(*columns).where(_table.c.deleted_at.is_(None)), _table, page, filters=HOST_FILTERS)
    by_id = {host.id: host for host in hosts.live(session, [row.id for row in found.rows])}
    return tuple(by_id[row.id] for row in found.rows if row.id in by_id), found.next_after


def counts(session: Session, host_ids: Sequence[str]) -> dict[str, HostCounts]:
    """Return how many vms each host has; one query over ix_vm_host_id."""
    vm = schema.vm
    running = sa.func.sum(sa.case((vm.c.observed_state == "running", 1), else_=0))
    query = (
        sa.select(vm.c.host_id, sa.func.count().label("vms"), running.label("running"))
        .where(vm.c.host_id.in_(host_ids), vm.c.deleted_at.is_(None))
        .group_by(vm.c.host_id)
    )
    found = {host_id: HostCounts(vms=0, vms_running=0) for host_id in host_ids}
    for row in session.execute(query):
        found[row.host_id] = HostCounts(vms=int(row.vms), vms_running=int(row.running))
    return found


def machines(session: Session) -> tuple[HostMachines, ...]:
    """Return what each host said that it can run."""
    query = sa.select(_table.c.name, _table.c.inventory).where(_table.c.deleted_at.is_(None)).order_by(_table.c.name)
    found = ((row.name, row.inventory or {}) for row in session.execute(query))
    return tuple(
        HostMachines(name=name, arch=str(told.get("arch", "")), machines=tuple(told.get("machines", ()))) for name, told in found
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A joined host and where others reach it."""

    id: str
    name: str
    agent_address: str
    migration_address: str
    is_up: bool


def reached(session: Session) -> tuple[Reached, ...]:
    """Return every joined host, by id."""
    columns = (_table.c.id, _table.c.name, _table.c.agent_address, _table.c.migration_address)
    query = sa.select(*columns, (_table.c.connectivity == "up").label("is_up")).where(_table.c.deleted_at.is_(None))
    return tuple(build(Reached, row) for row in session.execute(query.order_by(_table.c.id)))


def migration_reach(session: Session) -> tuple[tuple[str, str, Mapping[str, str]], ...]:
    """Return (id, migration address, labels) of every joined host."""
    query = sa.select(_table.c.id, _table.c.migration_address, _table.c.labels).where(_table.c.deleted_at.is_(None))
    return tuple((row.id, row.migration_address, row.labels) for row in session.execute(query.order_by(_table.c.id)))


def addresses(session: Session) -> tuple[tuple[str, str, str], ...]:
    """Return (id, name, agent address) of every joined host, for Prometheus."""
    query = sa.select(_table.c.id, _table.c.name, _table.c.agent_address).where(_table.c.deleted_at.is_(None))
    return tuple((row.id, row.name, row.agent_address) for row in session.execute(query.order_by(_table.c.name)))


def vms_on(session: Session, host_id: str, *, limit: int = 5) -> tuple[str, ...]:
    """Return names of vms that are placed on the host."""
    vm = schema.vm
    query = sa.select(vm.c.name).where(vm.c.host_id == host_id, vm.c.deleted_at.is_(None)).order_by(vm.c.name).limit(limit)
    return tuple(session.scalars(query))


def classes_page(session: Session, page: keyset.Page) -> tuple[tuple[HostClass, ...], tuple[str, str] | None]:
    query = sa.select(*columns_of(_class, HostClass)).where(_class.c.deleted_at.is_(None))
    found = keyset.fetch(session, query, _class, page, filters=CLASS_FILTERS)
    return tuple(build(HostClass, row) for row in found.rows), found.next_after


def tokens_page(
    session: Session, page: keyset.Page, *, now: datetime
) -> tuple[tuple[host_tokens.HostToken, ...], tuple[str, str] | None]:
    """Return the tokens that can still be used."""
    table = schema.host_token
    query = sa.select(table).where(table.c.used_at.is_(None), table.c.expires_at > now)
    found = keyset.fetch(session, query, table, page, filters=TOKEN_FILTERS)
    return tuple(build(host_tokens.HostToken, row) for row in found.rows), found.next_after
