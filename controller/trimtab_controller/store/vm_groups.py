"""Vm groups in SQL: rules, members. A place in a group is claimed by `claims.join_group`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import VmGroup
from trimtab_controller.core.placement.needs import GroupRule
from trimtab_controller.store import keyset, lookup, schema
from trimtab_controller.store.among import among, among_asked
from trimtab_controller.store.rows import build, columns_of

_table, _member = schema.vm_group, schema.vm_group_member

FILTERS: keyset.Filters = {"name": keyset.equals(_table.c.name)}

_NAMES_OF = (
    sa.select(_member.c.vm_id, _table.c.name)
    .join(_table, _table.c.id == _member.c.vm_group_id)
    .where(among_asked(_member.c.vm_id, "vm_ids"), _table.c.deleted_at.is_(None))
)


def insert(session: Session, *, group_id: str, project_id: str, name: str, rules: Sequence[GroupRule], now: datetime) -> VmGroup:
    """Insert a group. AlreadyExists where the project has one of that name."""
    rule = {"rules": [one.as_json() for one in rules]}
    values = {"id": group_id, "project_id": project_id, "name": name, "rule": rule, "created_at": now}
    return lookup.insert_named(session, _table, VmGroup, "vm group", **values)


def find(session: Session, project_id: str, name_or_id: str) -> VmGroup | None:
    return lookup.find(session, _table, VmGroup, name_or_id, project_ids=(project_id,))


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[VmGroup, ...], tuple[str, str] | None]:
    """Return the project's groups."""
    query = sa.select(*columns_of(_table, VmGroup)).where(_table.c.deleted_at.is_(None), _table.c.project_id == project_id)
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(VmGroup, row) for row in found.rows), found.next_after


def add_member(session: Session, group_id: str, vm_id: str) -> None:
    session.execute(_member.insert(), {"vm_group_id": group_id, "vm_id": vm_id})


@dataclass(frozen=True, slots=True)
class Member:
    vm_id: str
    name: str
    host_id: str


def members(session: Session, group_ids: Sequence[str]) -> Mapping[str, tuple[Member, ...]]:
    """Return the live members of each group, by name."""
    vm = schema.vm
    query = (
        sa.select(_member.c.vm_group_id, vm.c.id.label("vm_id"), vm.c.name, vm.c.host_id)
        .join(vm, vm.c.id == _member.c.vm_id)
        .where(among(_member.c.vm_group_id, group_ids), vm.c.deleted_at.is_(None))
        .order_by(vm.c.name)
    )
    found: dict[str, list[Member]] = {group_id: [] for group_id in group_ids}
    for row in session.execute(query):
        found[row.vm_group_id].append(Member(row.vm_id, row.name, row.host_id))
    return {group_id: tuple(rows) for group_id, rows in found.items()}


def names_of(session: Session, vm_ids: Sequence[str]) -> Mapping[str, str]:
    """Return the name of each vm's group; vms without one are left out."""
    return {row.vm_id: row.name for row in session.execute(_NAMES_OF, {"vm_ids": list(vm_ids)})}


def set_rules(session: Session, group: VmGroup, rules: Sequence[GroupRule], *, expected_version: int | None) -> None:
    """Write the group's rules; a placement that was decided on the old ones is decided again. Conflict `stale-etag`."""
    rule = {"rules": [one.as_json() for one in rules]}
    noun, raised = f"vm group {group.name}", _table.c.generation + 1
    lookup.update_version(session, _table, noun, group.id, expected_version=expected_version, rule=rule, generation=raised)


def delete(session: Session, group: VmGroup, *, expected_version: int | None, now: datetime) -> None:
    """Hide the group. Conflict `stale-etag`."""
    noun = f"vm group {group.name}"
    lookup.update_version(session, _table, noun, group.id, expected_version=expected_version, deleted_at=now)
