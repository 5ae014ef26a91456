"""Operations: lists, one with its journal, wait, cancel, retry, explain."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.lists import PAGE_SIZE, FilterText, ListQuery, PageSize, PageToken, parse
from trimtab_controller.api.mutate import Order, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime
from trimtab_controller.api.paths import OperationPath
from trimtab_controller.api.render import dump, dump_list, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, OperationResource, render_operation
from trimtab_controller.api.resources.vms import ExplanationResource, render_decision
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import requires
from trimtab_controller.api.tailer import Interest
from trimtab_controller.core.lifecycle import ENDED_STATES
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.core.placement.verdict import Decision
from trimtab_controller.services import operations_view
from trimtab_controller.services.authorise import Access, Scope, visible_projects
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["operations"])
Anyone = Annotated[Access, requires(Role.VIEWER, Scope.OBJECT)]
AnyoneOperating = Annotated[Access, requires(Role.OPERATOR, Scope.OBJECT)]
_SHORT = r"^[ -~]*$"
KindText = Annotated[str, Query(max_length=63, pattern=_SHORT, examples=["vm.create"])]
StateText = Annotated[str, Query(max_length=63, pattern=_SHORT, examples=["running"])]
SubjectText = Annotated[str, Query(max_length=63, pattern=_SHORT, examples=["web1"])]
# The tailer tells of every state; progress has no event, and a lost wake must not cost the whole timeout.
LOOK_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationExplanation:
    operation: OperationResource
    # The placement it led to or was refused by.
    placement: ExplanationResource | None


async def _query(
    request: Request,
    page_size: int,
    page_token: str,
    filter_text: str,
    given: dict[str, str],
) -> ListQuery:
    """Fold the parameters of their own into the filter."""
    parts = [filter_text, *(f"{name}={value}" for name, value in given.items() if value)]
    return parse(
        request,
        page_size=page_size,
        page_token=page_token,
        filter_text=",".join(part for part in parts if part),
        selector="",
        order_by="id desc",
    )


@router.get("/v1/operations", response_model=ListOf[OperationResource])
async def list_operations(
    request: Request,
    runtime: InRuntime,
    access: Annotated[Access, requires(Role.VIEWER, Scope.SELF)],
    page_size: PageSize = PAGE_SIZE,
    page_token: PageToken = "",
    filter_text: FilterText = "",
    kind: KindText = "",
    state: StateText = "",
    subject: SubjectText = "",
    done: bool | None = None,
) -> Response:
    """List operations that the caller may see, newest first; filter by kind, state, subject, actor, request_id, done."""
    given = {"kind": kind, "state": state, "subject": subject, "done": "" if done is None else str(done).lower()}
    query = await _query(request, page_size, page_token, filter_text, given)
    return await _list(runtime, query, visible_projects(access.actor))


@router.get("/v1/projects/{project}/operations", response_model=ListOf[OperationResource])
async def list_project_operations(
    request: Request,
    runtime: InRuntime,
    access: Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)],
    page_size: PageSize = PAGE_SIZE,
    page_token: PageToken = "",
    filter_text: FilterText = "",
    kind: KindText = "",
    state: StateText = "",
    subject: SubjectText = "",
    done: bool | None = None,
) -> Response:
    """List the project's operations, newest first."""
    given = {"kind": kind, "state": state, "subject": subject, "done": "" if done is None else str(done).lower()}
    query = await _query(request, page_size, page_token, filter_text, given)
    return await _list(runtime, query, [access.project_id])


async def _list(runtime: Runtime, query: ListQuery, project_ids: Sequence[str] | None) -> Response:
    found, after = await runtime.context.db.read(
        lambda session: operations_view.page(session, query.page, project_ids=project_ids)
    )
    items = [render_operation(view) for view in found]
    return json_response(dump_list(OperationResource, items, query.next_token(after)))


@router.get("/v1/operations/{operation}:wait", response_model=OperationResource)
async def wait_operation(
    runtime: InRuntime,
    access: Anyone,
    operation: OperationPath,
    timeout_s: Annotated[float, Query(ge=0, le=60, examples=[30])] = 30,
) -> Response:
    """Return the operation once it has ended, or as it is after the timeout."""
    end_s = time.monotonic() + timeout_s
    interest = Interest(project_ids=None, operation_id=operation)
    with runtime.tailer.subscribe(interest) as subscription:
        while True:
            view = await runtime.context.db.read(lambda session: operations_view.get(session, operation, actor=access.actor))
            left_s = end_s - time.monotonic()
            if view.operation.state in ENDED_STATES or left_s <= 0:
                return json_response(dump(render_operation(view)))
            await subscription.take(min(left_s, LOOK_AGAIN_S))


@router.get("/v1/operations/{operation}:explain", response_model=OperationExplanation)
async def explain_operation(runtime: InRuntime, access: Anyone, operation: OperationPath) -> Response:
    """Tell what the operation did and which placement it got."""

    def read(session: Session) -> OperationExplanation:
        explained = operations_view.explain(session, operation, actor=access.actor)
        row, placement = explained.decision, None
        if row is not None:
            decision = Decision.from_json(row.verdicts)
            placement = render_decision(
                decision,
                vm_name=explained.view.operation.subject_name,
                host_name=decision.chosen.host_name if decision.chosen else "",
                decided_at=row.created_at,
                fleet_revision=row.fleet_revision,
                why_not="",
            )
        return OperationExplanation(operation=render_operation(explained.view), placement=placement)

    return json_response(dump(await runtime.context.db.read(read)))


@router.get("/v1/operations/{operation}", response_model=OperationResource)
async def get_operation(runtime: InRuntime, access: Anyone, operation: OperationPath) -> Response:
    """Return one operation with its journal."""
    view = await runtime.context.db.read(lambda session: operations_view.get(session, operation, actor=access.actor))
    return json_response(dump(render_operation(view)))


@router.post("/v1/operations/{operation}:cancel", response_model=OperationAnswer)
async def cancel_operation(request: Request, access: AnyoneOperating, operation: OperationPath, asked: Asked) -> Response:
    """Ask a live operation to end: it is undone, unless it is past the point of no return."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view = operations_view.cancel(session, operation, actor=actor, now=now)
        return _told(view)

    return await mutate(Order(request=request, access=access, wish=asked, verb="operation.cancel"), work)


@router.post("/v1/operations/{operation}:retry", response_model=OperationAnswer)
async def retry_operation(request: Request, access: AnyoneOperating, operation: OperationPath, asked: Asked) -> Response:
    """Let an operation that needs attention go on where it stopped."""

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        return _told(operations_view.retry(session, operation, actor=actor, now=now))

    return await mutate(Order(request=request, access=access, wish=asked, verb="operation.retry"), work)


def _told(view: operations_view.OperationView) -> Answer:
    answer = answered(OperationAnswer(operation=render_operation(view)))
    return Answer(status=answer.status, body=answer.body, has_operation=True)
