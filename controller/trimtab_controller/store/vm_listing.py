"""Lists of vms, with filters and selectors, and what is shown beside each: a constant number of queries per page."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import DesiredPower
from trimtab_controller.core.model import Vm, VmSummary
from trimtab_controller.store import keyset, schema
from trimtab_controller.store.rows import build, columns_of

Columns = tuple[sa.ColumnElement[Any], ...]

_table = schema.vm
_VM_COLUMNS: Columns = tuple(columns_of(_table, Vm))
_SUMMARY_COLUMNS: Columns = tuple(
    sa.cast(_table.c[name], sa.Text).label(name) if isinstance(_table.c[name].type, sa.JSON) else _table.c[name]
    for name in VmSummary._fields
)

FILTERS: keyset.Filters = {
    "name": keyset.equals(_table.c.name),
    "host": keyset.named(_table.c.host_id, schema.host),
    "state": keyset.equals(_table.c.observed_state),
    "desired": keyset.equals(_table.c.desired_power),
    "image": keyset.named(_table.c.image_id, schema.image),
    "arch": keyset.equals(_table.c.arch),
    "network": lambda value: _table.c.id.in_(
        sa.select(schema.nic.c.vm_id)
        .join(schema.network, schema.network.c.id == schema.nic.c.network_id)
        .where(sa.or_(schema.network.c.name == value, schema.network.c.id == value))
    ),
}


def page(
    session: Session, page: keyset.Page, *, project_ids: Sequence[str] | None, with_deleted: bool = False
) -> tuple[tuple[Vm, ...], tuple[str, str] | None]:
    """Return the projects' vms (None: of all); `with_deleted` adds those that `undelete` can still bring back."""
    found = _rows(session, page, _VM_COLUMNS, project_ids=project_ids, with_deleted=with_deleted)
    return tuple(build(Vm, row) for row in found.rows), found.next_after


def summaries(
    session: Session, page: keyset.Page, *, project_id: str, with_deleted: bool = False
) -> tuple[tuple[VmSummary, ...], tuple[str, str] | None]:
    """Return a page of the project's vms with a third of their columns."""
    found = _rows(session, page, _SUMMARY_COLUMNS, project_ids=[project_id], with_deleted=with_deleted)
    return tuple(map(VmSummary._make, found.rows)), found.next_after


def _rows(
    session: Session, page: keyset.Page, columns: Columns, *, project_ids: Sequence[str] | None, with_deleted: bool
) -> keyset.Rows:
    owners = {f"project_{i}": one for i, one in enumerate(project_ids or ())}
    query = _listed(columns, None if project_ids is None else tuple(owners), with_deleted)
    return keyset.fetch(session, query, _table, page, filters=FILTERS, given=owners)


@lru_cache(64)
def _listed(columns: Columns, owners: tuple[str, ...] | None, with_deleted: bool) -> sa.Select[Any]:
    """Return the query of `_rows` with a parameter for each project. Plan: uq_vm_name_live, for one project in order."""
    query = sa.select(*columns)
    query = query.where(_table.c.purged_at.is_(None)) if with_deleted else query.where(_table.c.deleted_at.is_(None))
    if owners is None:
        return query
    asked = [sa.bindparam(owner, type_=_table.c.project_id.type) for owner in owners]
    return query.where(_table.c.project_id == asked[0] if len(asked) == 1 else _table.c.project_id.in_(asked))


def to_leave(session: Session, host_id: str) -> tuple[Vm, ...]:
    """Return the vms of a host that go on elsewhere when it is emptied, by name: all but those that shall be off."""
    rows = session.execute(
        sa.select(*columns_of(_table, Vm))
        .where(_table.c.host_id == host_id, _table.c.deleted_at.is_(None), _table.c.desired_power != DesiredPower.STOPPED.value)
        .order_by(_table.c.name, _table.c.id)
    )
    return tuple(build(Vm, row) for row in rows)


def by_ids(session: Session, vm_ids: Sequence[str]) -> tuple[Vm, ...]:
    """Return these vms, deleted ones too; ids that are none are left out."""
    rows = session.execute(sa.select(*columns_of(_table, Vm)).where(_table.c.id.in_(vm_ids)))
    return tuple(build(Vm, row) for row in rows)
