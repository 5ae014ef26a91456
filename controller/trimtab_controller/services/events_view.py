"""Events as users see them: a page with the names of what they are about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from trimtab_controller.core.ids import kind_of
from trimtab_controller.core.model import Event
from trimtab_controller.store import event_listing, events
from trimtab_protos.errors import Conflict, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsPage:
    events: tuple[Event, ...]
    # id -> name of projects and subjects.
    names: Mapping[str, str]
    has_more: bool
    # The number to read on from.
    last_seq: int


def page(
    session: Session,
    *,
    after: int | None,
    settled: int,
    limit: int,
    project_ids: Sequence[str] | None,
    subject_id: str = "",
    kind_prefix: str = "",
) -> EventsPage:
    """Return the events after a number, oldest first; without one the newest. Conflict `events-expired` past the retention.

    `settled`: the number up to which none can appear any more. The newest are shown beyond it too, but not read on from there.
    """
    if after is not None:
        check_kept(session, after)
        found = events.page_after(
            session,
            after,
            until=settled,
            limit=limit + 1,
            project_ids=project_ids,
            subject_id=subject_id,
            kind_prefix=kind_prefix,
        )
        shown = found[:limit]
        last_seq = shown[-1].seq if shown else after
        return EventsPage(events=shown, names=names_of(session, shown), has_more=len(found) > limit, last_seq=last_seq)
    found = event_listing.newest(session, limit=limit, project_ids=project_ids, subject_id=subject_id, kind_prefix=kind_prefix)
    last_seq = min(found[-1].seq if found else 0, settled)
    return EventsPage(events=found, names=names_of(session, found), has_more=False, last_seq=last_seq)


def check_kept(session: Session, after: int) -> None:
    """Raise Conflict `events-expired` where events after this number are deleted already; 0 asks for all that is kept."""
    oldest, _newest = events.bounds(session)
    if after and after + 1 < oldest:
        raise Conflict(
            "events-expired", f"events up to {oldest - 1} are no longer kept; read the lists again, then watch on", oldest=oldest
        )


def names_of(session: Session, found: Sequence[Event]) -> dict[str, str]:
    """Return id -> name of the events' projects and subjects."""
    return event_listing.names_of(session, found)


def subject_id(session: Session, name_or_id: str, *, project_ids: Sequence[str] | None) -> str:
    """Return the id of what is called so, vms before hosts before the rest. NotFound where nothing is."""
    if kind_of(name_or_id):
        return name_or_id
    found = event_listing.find_subject(session, name_or_id, project_ids=project_ids)
    if not found:
        raise NotFound("subject-not-found", f"subject: nothing here is called {name_or_id}", field="subject")
    return found
