"""Events as users see them: a page with the names of what they are about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.ids import kind_of
from trimtab_controller.core.model import Event
from trimtab_controller.store import event_listing, events, lookup, schema
from trimtab_protos.errors import Conflict, NotFound

# Where an event's subject may be found, by the kind of its id.
_TABLES: Mapping[str, sa.Table] = {
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
# Of these, who sees names is a matter of the project.
_OWNED = ("vm", "img", "vol", "net")


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsPage:
    events: tuple[Event, ...]
    # id -> name of projects and subjects.
    names: Mapping[str, str]
    has_more: bool


def page(
    session: Session,
    *,
    after: int | None,
    limit: int,
    project_ids: Sequence[str] | None,
    subject_id: str = "",
    kind_prefix: str = "",
) -> EventsPage:
    """Return the events after a number, oldest first; without one the newest. Conflict `events-expired` past the retention."""
    if after is not None:
        check_kept(session, after)
        found = events.page_after(
            session, after, limit=limit + 1, project_ids=project_ids, subject_id=subject_id, kind_prefix=kind_prefix
        )
        return EventsPage(events=found[:limit], names=names_of(session, found[:limit]), has_more=len(found) > limit)
    found = event_listing.newest(session, limit=limit, project_ids=project_ids, subject_id=subject_id, kind_prefix=kind_prefix)
    return EventsPage(events=found, names=names_of(session, found), has_more=False)


def check_kept(session: Session, after: int) -> None:
    """Raise Conflict `events-expired` where events after this number are deleted already; 0 asks for all that is kept."""
    oldest, _newest = events.bounds(session)
    if after and after + 1 < oldest:
        raise Conflict(
            "events-expired", f"events up to {oldest - 1} are no longer kept; read the lists again, then watch on", oldest=oldest
        )


def names_of(session: Session, found: Sequence[Event]) -> dict[str, str]:
    """Return the names of the events' projects and subjects; one query."""
    wanted: dict[sa.Table, set[str]] = {schema.project: {event.project_id for event in found}}
    for event in found:
        table = _TABLES.get(kind_of(event.subject_id))
        if table is not None:
            wanted.setdefault(table, set()).add(event.subject_id)
    return lookup.names_in(session, wanted)


def subject_id(session: Session, name_or_id: str, *, project_ids: Sequence[str] | None) -> str:
    """Return the id of what is called so, vms before hosts before the rest. NotFound where nothing is."""
    if kind_of(name_or_id):
        return name_or_id
    for kind, table in _TABLES.items():
        query = sa.select(table.c.id).where(table.c.name == name_or_id).order_by(table.c.deleted_at.is_not(None)).limit(1)
        if kind in _OWNED and project_ids is not None:
            query = query.where(table.c.project_id.in_([*project_ids, ""] if kind != "vm" else project_ids))
        elif project_ids is not None:
            continue  # the fleet's own
        found = session.scalars(query).first()
        if found is not None:
            return str(found)
    raise NotFound("subject-not-found", f"subject: nothing here is called {name_or_id}", field="subject")
