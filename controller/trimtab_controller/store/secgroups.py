"""Security groups in SQL: rules, members, and how far each vm's hosts have followed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core import firewall
from trimtab_controller.core.model import SecGroup
from trimtab_controller.store import keyset, lookup, schema
from trimtab_controller.store.among import among
from trimtab_controller.store.inserts import insert_unless_taken
from trimtab_controller.store.rows import build, columns_of
from trimtab_protos.network_messages import FirewallRule, FirewallSpec

_table, _member, _state = schema.secgroup, schema.secgroup_member, schema.vm_firewall

FILTERS: keyset.Filters = {"name": keyset.equals(_table.c.name)}

# Plan: primary key; most vms have no row, and one look is all that they cost.
_GENERATION = sa.select(_state.c.generation).where(_state.c.vm_id == sa.bindparam("of_vm"))
_RULES = (
    sa.select(_table.c.rules)
    .join(_member, _member.c.secgroup_id == _table.c.id)
    .where(_member.c.vm_id == sa.bindparam("of_vm"), _table.c.deleted_at.is_(None))
)


def insert(session: Session, *, secgroup_id: str, project_id: str, name: str, rules: Sequence[str], now: datetime) -> SecGroup:
    """Insert a group. AlreadyExists where the project has one of that name."""
    values = {"id": secgroup_id, "project_id": project_id, "name": name, "rules": list(rules), "created_at": now}
    return lookup.insert_named(session, _table, SecGroup, "security group", **values)


def find(session: Session, project_id: str, name_or_id: str) -> SecGroup | None:
    return lookup.find(session, _table, SecGroup, name_or_id, project_ids=(project_id,))


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[SecGroup, ...], tuple[str, str] | None]:
    """Return the project's groups."""
    query = sa.select(*columns_of(_table, SecGroup)).where(_table.c.deleted_at.is_(None), _table.c.project_id == project_id)
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(SecGroup, row) for row in found.rows), found.next_after


def set_rules(session: Session, group: SecGroup, rules: Sequence[str], *, expected_version: int | None) -> None:
    """Write the group's rules. Conflict `stale-etag`."""
    noun = f"security group {group.name}"
    lookup.update_version(session, _table, noun, group.id, expected_version=expected_version, rules=list(rules))


def delete(session: Session, group: SecGroup, *, expected_version: int | None, now: datetime) -> None:
    """Hide the group. Conflict `stale-etag`."""
    noun = f"security group {group.name}"
    lookup.update_version(session, _table, noun, group.id, expected_version=expected_version, deleted_at=now)


# --- members ---------------------------------------------------------------------------------------------------------------


def members(session: Session, group_ids: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
    """Return {vm id: name} of each group, by name; deleted vms count until they are purged."""
    vm = schema.vm
    query = (
        sa.select(_member.c.secgroup_id, vm.c.id, vm.c.name)
        .join(vm, vm.c.id == _member.c.vm_id)
        .where(among(_member.c.secgroup_id, group_ids))
        .order_by(vm.c.name, vm.c.id)
    )
    found: dict[str, dict[str, str]] = {group_id: {} for group_id in group_ids}
    for row in session.execute(query):
        found[row.secgroup_id][row.id] = row.name
    return found


def names_of(session: Session, vm_ids: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the names of each vm's groups; vms without one are left out."""
    query = (
        sa.select(_member.c.vm_id, _table.c.name)
        .join(_table, _table.c.id == _member.c.secgroup_id)
        .where(among(_member.c.vm_id, vm_ids))
        .order_by(_table.c.name)
    )
    found: dict[str, tuple[str, ...]] = {}
    for row in session.execute(query):
        found[row.vm_id] = (*found.get(row.vm_id, ()), row.name)
    return found


def ids_of(session: Session, vm_id: str) -> tuple[str, ...]:
    """Return the ids of the vm's groups."""
    return tuple(
        session.scalars(sa.select(_member.c.secgroup_id).where(_member.c.vm_id == vm_id).order_by(_member.c.secgroup_id))
    )


def set_groups(session: Session, vm_id: str, group_ids: Collection[str]) -> None:
    """Put the vm into these groups and no others."""
    session.execute(_member.delete().where(_member.c.vm_id == vm_id))
    for group_id in sorted(group_ids):
        session.execute(_member.insert().values(secgroup_id=group_id, vm_id=vm_id))


def forget(session: Session, vm_id: str) -> None:
    """Take the vm out of every group for good."""
    session.execute(_member.delete().where(_member.c.vm_id == vm_id))
    session.execute(_state.delete().where(_state.c.vm_id == vm_id))


# --- what hosts are told ------------------------------------------------------------------------------------------------------


def raise_generation(session: Session, vm_ids: Collection[str]) -> None:
    """Say, in the transaction that changes what may reach these vms, that hosts have to follow."""
    for vm_id in sorted(vm_ids):
        if insert_unless_taken(session, _state, {"vm_id": vm_id, "generation": 1}) is None:
            session.execute(_state.update().where(_state.c.vm_id == vm_id).values(generation=_state.c.generation + 1))


def firewall_of(session: Session, vm_id: str) -> FirewallSpec | None:
    """Return what may reach the vm, as its groups say together; None where it never was in any."""
    generation = session.execute(_GENERATION, {"of_vm": vm_id}).scalar_one_or_none()
    if generation is None:
        return None
    groups = [tuple(rules) for rules in session.scalars(_RULES, {"of_vm": vm_id})]
    parsed = [[rule for text in rules if isinstance(rule := firewall.parse_rule(text), firewall.Rule)] for rules in groups]
    rules = tuple(
        FirewallRule(protocol=one.protocol, first_port=one.first_port, last_port=one.last_port, source=one.source)
        for one in firewall.union(parsed)
    )
    return FirewallSpec(generation=int(generation), is_closed=bool(groups), rules=rules)


def record_applied(session: Session, applied: Mapping[str, int]) -> None:
    """Note under which generation all hosts of these vms are, by vm id."""
    for vm_id, generation in sorted(applied.items()):
        query = _state.update().where(
            _state.c.vm_id == vm_id, _state.c.applied_generation < generation, _state.c.generation >= generation
        )
        session.execute(query.values(applied_generation=generation))


@dataclass(frozen=True, slots=True)
class Behind:
    vm_id: str
    name: str
    project_id: str


def behind(session: Session, *, limit: int) -> tuple[Behind, ...]:
    """Return vms whose host is up and has not said that it follows their groups."""
    vm, host = schema.vm, schema.host
    query = (
        sa.select(vm.c.id, vm.c.name, vm.c.project_id)
        .join(_state, _state.c.vm_id == vm.c.id)
        .join(host, host.c.id == vm.c.host_id)
        .where(_state.c.applied_generation < _state.c.generation, host.c.connectivity == "up", host.c.deleted_at.is_(None))
        .where(vm.c.deleted_at.is_(None))
        .order_by(vm.c.id)
        .limit(limit)
    )
    return tuple(Behind(row.id, row.name, row.project_id) for row in session.execute(query))
