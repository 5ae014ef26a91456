"""Events: pages, and streams of what comes."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api import streams
from trimtab_controller.api.lists import PAGE_SIZE, PageSize
from trimtab_controller.api.params import InRuntime
from trimtab_controller.api.render import dump, json_response
from trimtab_controller.api.resources.events import EventPage, render_event
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import requires
from trimtab_controller.api.tailer import Interest
from trimtab_controller.core.model import Role
from trimtab_controller.services import events_view
from trimtab_controller.services.authorise import Access, Scope, visible_projects
from trimtab_protos.errors import InvalidRequest

router = APIRouter(tags=["events"])
SEQ_MAX = 2**53
After = Annotated[int | None, Query(ge=0, le=SEQ_MAX, examples=[0], description="Only events with a higher number.")]
SubjectName = Annotated[str, Query(max_length=63, pattern=r"^[a-z0-9-]*$", examples=["web1"], description="Name or id.")]
KindPrefix = Annotated[str, Query(max_length=40, pattern=r"^[a-z_.-]*$", examples=["vm."], description="Kind, or its beginning.")]
Watch = Annotated[bool, Query(description="A stream of events, as with Accept: text/event-stream.")]
LastEventId = Annotated[str, Header(max_length=20, examples=["1042"])]
EVENT_STREAM = "text/event-stream"


@router.get("/v1/events", response_model=EventPage, responses={200: {"content": {EVENT_STREAM: {}}}})
async def list_events(
    request: Request,
    runtime: InRuntime,
    access: Annotated[Access, requires(Role.VIEWER, Scope.SELF)],
    after: After = None,
    subject: SubjectName = "",
    kind: KindPrefix = "",
    page_size: PageSize = PAGE_SIZE,
    watch: Watch = False,
    last_event_id: LastEventId = "",
) -> Response:
    """List events of the projects that the caller may see: the newest, or with `after` the next ones, oldest first."""
    interest = await _interest(runtime, access, subject, kind)
    return await _answer(request, runtime, access, interest, _after(after, last_event_id), page_size, watch=watch)


@router.get("/v1/projects/{project}/events", response_model=EventPage, responses={200: {"content": {EVENT_STREAM: {}}}})
async def list_project_events(
    request: Request,
    runtime: InRuntime,
    access: Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)],
    after: After = None,
    subject: SubjectName = "",
    kind: KindPrefix = "",
    page_size: PageSize = PAGE_SIZE,
    watch: Watch = False,
    last_event_id: LastEventId = "",
) -> Response:
    """List the project's events: the newest, or with `after` the next ones, oldest first."""
    interest = await _interest(runtime, access, subject, kind)
    return await _answer(request, runtime, access, interest, _after(after, last_event_id), page_size, watch=watch)


async def _interest(runtime: Runtime, access: Access, subject: str, kind: str) -> Interest:
    project_ids = [access.project_id] if access.project else visible_projects(access.actor)
    subject_id = ""
    if subject:
        subject_id = await runtime.context.db.read(
            lambda session: events_view.subject_id(session, subject, project_ids=project_ids)
        )
    return Interest(project_ids=project_ids, subject_id=subject_id, kind_prefix=kind)


async def _answer(
    request: Request,
    runtime: Runtime,
    access: Access,
    interest: Interest,
    after: int | None,
    page_size: int,
    *,
    watch: bool,
) -> Response:
    if watch or EVENT_STREAM in request.headers.get("accept", ""):
        return await streams.watch_events(request, runtime, access, interest, after)

    settled = await runtime.settled_events.newest()

    def read(session: Session) -> EventPage:
        page = events_view.page(
            session,
            after=after,
            settled=settled,
            limit=page_size,
            project_ids=interest.project_ids,
            subject_id=interest.subject_id,
            kind_prefix=interest.kind_prefix,
        )
        items = tuple(render_event(event, page.names) for event in page.events)
        return EventPage(items=items, next_page_token=str(page.last_seq) if page.has_more else "", last_seq=page.last_seq)

    return json_response(dump(await runtime.context.db.read(read)))


def _after(after: int | None, last_event_id: str) -> int | None:
    """A client that comes back says what it saw last; that is newer than the `after` of its address."""
    if not last_event_id:
        return after
    if not (last_event_id.isascii() and last_event_id.isdecimal()) or int(last_event_id) > SEQ_MAX:
        raise InvalidRequest("event-id-wrong", "Last-Event-ID: the number of an event, as in 1042", field="Last-Event-ID")
    return int(last_event_id)
