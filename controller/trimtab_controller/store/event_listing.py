"""The newest events, for a list that nobody has read before, and what events are about. What comes after a number: `events.py`."""

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.ids import kind_of
from trimtab_controller.core.model import Event
from trimtab_controller.store import lookup, schema
from trimtab_controller.store.rows import build

_table = schema.event
# Where an event's subject may be found, by the kind of its id.
_SUBJECTS: Mapping[str, sa.Table] = {
    "vm": schema.vm,
    "host": schema.host,
    "img": schema.image,
    "vol": schema.volume,
    "net": schema.network,
    "pool": schema.pool,
    "proj": schema.project,
    "user": schema.user,
    "hc": schema.host_class,
}
# Of these, who may ask for a name is a matter of the project; images and networks may be shared.
_OWNED = frozenset({"vm", "img", "vol", "net"})


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


def names_of(session: Session, found: Sequence[Event]) -> dict[str, str]:
    """Return id -> name of the events' projects and subjects; one query."""
    wanted: dict[sa.Table, set[str]] = {schema.project: {event.project_id for event in found}}
    for event in found:
        table = _SUBJECTS.get(kind_of(event.subject_id))
        if table is not None:
            wanted.setdefault(table, set()).add(event.subject_id)
    return lookup.names_in(session, wanted)


def find_subject(session: Session, name: str, *, project_ids: Sequence[str] | None) -> str:
    """Return the id of what is called so in these projects (None: anywhere), vms first; '' where nothing is."""
    for kind, table in _SUBJECTS.items():
        query = sa.select(table.c.id).where(table.c.name == name).order_by(table.c.deleted_at.is_not(None)).limit(1)
        if project_ids is not None:
            if kind not in _OWNED:
                continue  # the fleet's own
            query = query.where(table.c.project_id.in_([*project_ids, ""]))
        found = session.scalars(query).first()
        if found is not None:
            return str(found)
    return ""
