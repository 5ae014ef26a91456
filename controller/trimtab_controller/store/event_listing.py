"""The newest events, for a list that nobody has read before. What comes after a number: `events.page_after`."""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Event
from trimtab_controller.store import schema
from trimtab_controller.store.rows import build

_table = schema.event


def newest(
    session: Session,
    *,
    limit: int,
    project_ids: Sequence[str] | None,
    subject_id: str = "",
    kind_prefix: str = "",
) -> tuple[Event, ...]:
    """Return the newest `limit` events of these projects (None: all), oldest of them first."""
    query = sa.select(_table).order_by(_table.c.seq.desc()).limit(limit)
    if project_ids is not None:
        query = query.where(_table.c.project_id.in_(project_ids))
    if subject_id:
        query = query.where(_table.c.subject_id == subject_id)
    if kind_prefix:
        query = query.where(_table.c.kind.startswith(kind_prefix, autoescape=True))
    return tuple(build(Event, row) for row in reversed(session.execute(query).all()))
