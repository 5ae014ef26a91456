"""Lists of operations for users, newest first."""

from collections.abc import Sequence

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
    query = sa.select(_table)
    if project_ids is not None:
        query = query.where(_table.c.project_id.in_(project_ids))
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(operations.from_row(row) for row in found.rows), found.next_after
