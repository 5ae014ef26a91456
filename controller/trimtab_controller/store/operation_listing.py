"""Lists of operations for users, newest first."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.lifecycle import ENDED_STATES
from trimtab_controller.core.model import Operation
from trimtab_controller.store import keyset, operations, schema

_table = schema.operation
_ENDED = tuple(state.value for state in ENDED_STATES)


FILTERS: keyset.Filters = {
    "kind": keyset.equals(_table.c.kind),
    "state": keyset.equals(_table.c.state),
    "subject": lambda value: sa.or_(_table.c.subject_id == value, _table.c.subject_name == value),
    "actor": keyset.equals(_table.c.actor),
    "request_id": keyset.equals(_table.c.request_id),
    "done": keyset.is_true(_table.c.state.in_(_ENDED), "done"),
}


def page(
    session: Session, page: keyset.Page, *, project_ids: Sequence[str] | None
) -> tuple[tuple[Operation, ...], tuple[str, str] | None]:
    """Return operations of the projects ('' among them: the fleet's own; None: all). Plan: ix_operation_project or the key."""
    owners = {f"project_{i}": one for i, one in enumerate(project_ids or ())}
    query = _listed(None if project_ids is None else tuple(owners))
    found = keyset.fetch(session, query, _table, page, filters=FILTERS, given=owners)
    return tuple(operations.from_row(row) for row in found.rows), found.next_after


@lru_cache(64)
def _listed(owners: tuple[str, ...] | None) -> sa.Select[Any]:
    """Return the query of `page` with a parameter for each project."""
    query = sa.select(_table)
    if owners is None:
        return query
    return query.where(_table.c.project_id.in_([sa.bindparam(owner, type_=_table.c.project_id.type) for owner in owners]))
