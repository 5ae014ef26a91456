"""The audit trail."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.lists import PAGE_SIZE, FilterText, PageSize, PageToken, parse
from trimtab_controller.api.params import InRuntime
from trimtab_controller.api.render import dump_list, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.identity import AuditResource, render_audit
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Role
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.store import audit, lookup, schema
from trimtab_protos.errors import InvalidRequest

router = APIRouter(tags=["audit"])
Instant = Annotated[datetime | None, Query(examples=["2026-11-23T10:00:00Z"], description="With a time zone.")]


@router.get("/v1/audit", response_model=ListOf[AuditResource])
async def list_audit(
    request: Request,
    runtime: InRuntime,
    _access: Annotated[Access, requires(Role.ADMIN, Scope.FLEET)],
    since: Instant = None,
    until: Instant = None,
    page_size: PageSize = PAGE_SIZE,
    page_token: PageToken = "",
    filter_text: FilterText = "",
) -> Response:
    """List what was asked of the fleet, newest first; filter by actor, verb, resource, outcome, project, request_id."""
    query = parse(request, page_size=page_size, page_token=page_token, filter_text=filter_text, selector="", order_by="id desc")
    before = _sequence(query.page.after)
    _check_instants(since=since, until=until)

    def read(session: Session) -> tuple[tuple[audit.AuditRecord, ...], dict[str, str]]:
        found = audit.page(session, limit=page_size + 1, before_seq=before, filters=query.page.filters, since=since, until=until)
        return found, lookup.names(session, schema.project, {record.project_id for record in found})

    found, names = await runtime.context.db.read(read)
    shown = found[:page_size]
    after = (str(shown[-1].seq), "") if len(found) > page_size else None
    items = [render_audit(record, names.get(record.project_id, "")) for record in shown]
    return json_response(dump_list(AuditResource, items, query.next_token(after)))


def _sequence(after: tuple[str, str] | None) -> int | None:
    if after is None:
        return None
    if not after[0].isdecimal() or len(after[0]) > 18:
        raise InvalidRequest("page-token", "page_token: not of this list; start again without it", field="page_token")
    return int(after[0])


def _check_instants(**instants: datetime | None) -> None:
    for field, instant in instants.items():
        if instant is not None and instant.tzinfo is None:
            raise InvalidRequest("instant-naive", f'{field}: say the time zone, as in "2026-11-23T10:00:00Z"', field=field)
