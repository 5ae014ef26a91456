"""Carries a mutation from a request to its one transaction and back."""

import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, TypeVar

from fastapi import Header, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, RequestId
from trimtab_controller.api.render import dump, etag_of, json_response
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import resource_of
from trimtab_controller.core.model import Actor
from trimtab_controller.services.authorise import Access
from trimtab_controller.services.mutations import Answer, DryRun, Mutation, perform, record
from trimtab_protos.errors import ErrorKind, InvalidRequest, TrimtabError

_ETAG = re.compile(r'(W/)?"([0-9]{1,18})"')


@dataclass(frozen=True, slots=True)
class Wish:
    """What headers and query say about a mutation."""

    # '' where the caller gave none.
    request_id: str
    is_dry_run: bool
    # Version that the object must still have; None: any.
    if_match: int | None


async def wish(
    idempotency_key: Annotated[
        RequestId | None, Header(description="A UUID: a repeat with the same one is answered, not done again.")
    ] = None,
    request_id: Annotated[RequestId | None, Query(description="As the header Idempotency-Key.")] = None,
    validate_only: Annotated[bool, Query(description="Check rights, fields and state, change nothing.")] = False,
    if_match: Annotated[
        str, Header(max_length=64, examples=['W/"3"'], description="The etag that the object must still have.")
    ] = "",
) -> Wish:
    return Wish(_only_one(idempotency_key, request_id), validate_only, _version(if_match))


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One mutation as a route hands it over."""

    request: Request
    access: Access
    wish: Wish
    verb: str
    body: Body | None = None
    # Appended to the path in the trail, for what a create names in its body.
    name: str = ""
    # SHA-256 of a body that is not JSON: the same request id with other bytes is another request.
    content_sha256: str = ""
    # Taken although the database is behind the fleet.
    ends_behind: bool = False


Work = Callable[[Session, Actor, datetime], Answer]
Prepared = TypeVar("Prepared")


async def mutate(order: Order, work: Work) -> Response:
    """Run `work` in one transaction with its trail and idempotency row; nudge after commit; render what came of it."""
    runtime: Runtime = order.request.app.state.runtime
    context = runtime.context
    mutation = _mutation(order, context.clock.now())
    order.request.state.request_id = mutation.actor.request_id
    context.db.reserve.check_room(keep_free_bytes=context.settings.disk_keep_free_bytes)

    def transaction(session: Session) -> Answer:
        context.db.reserve.refuse_if_spent(session)
        return perform(session, mutation, lambda inner: work(inner, mutation.actor, mutation.now))

    try:
        answer = await context.db.write(transaction)
    except DryRun as dry:
        return Response(status_code=204) if dry.answer.status == 204 else json_response(dry.answer.body)
    except TrimtabError as error:
        await _record_refusal(runtime, mutation, error)
        raise
    if answer.has_operation:
        context.nudge()
    if answer.status == 204:
        return Response(status_code=204)
    return json_response(answer.body, status=answer.status, etag=answer.etag)


async def prepared(order: Order, inputs: Awaitable[Prepared]) -> Prepared:
    """Return what a mutation works out before its transaction; a refusal there leaves the trail that one within it would."""
    runtime: Runtime = order.request.app.state.runtime
    try:
        return await inputs
    except TrimtabError as error:
        mutation = _mutation(order, runtime.context.clock.now())
        order.request.state.request_id = mutation.actor.request_id
        await _record_refusal(runtime, mutation, error)
        raise


def answered(resource: object, *, status: int = 200, version: int | None = None, stored: object | None = None) -> Answer:
    """Return the answer of a mutation that is done at once; `stored` is what a repeat gets instead."""
    return Answer(
        status=status,
        body=dump(resource),
        stored_body=dump(stored) if stored is not None else None,
        etag=etag_of(version) if version is not None else "",
    )


def accepted(resource: object, *, is_due: bool = True) -> Answer:
    """Return the 202 of durable work. `is_due`: a driver has something to do at once, else whoever works on it first wakes it."""
    return Answer(status=202, body=dump(resource), has_operation=is_due)


NO_CONTENT = Answer(status=204, body=b"")


def _mutation(order: Order, now: datetime) -> Mutation:
    given = _only_one(order.wish.request_id or None, order.body.request_id if order.body else None)
    request_id = given or order.request.state.request_id
    resource = resource_of(order.request)
    return Mutation(
        actor=replace(order.access.actor, request_id=request_id),
        verb=order.verb,
        resource=f"{resource}/{order.name}" if order.name else resource,
        project_id=order.access.project_id,
        fingerprint=_fingerprint(order) if given and not order.wish.is_dry_run else "",
        is_dry_run=order.wish.is_dry_run,
        now=now,
        ends_behind=order.ends_behind,
    )


def _fingerprint(order: Order) -> str:
    """Return a digest of everything that makes this request this request, but its id."""
    query = sorted((name, value) for name, value in order.request.query_params.multi_items() if name != "request_id")
    body: Any = order.body.model_dump(mode="json", exclude={"request_id"}, exclude_unset=True) if order.body else None
    parts = [order.request.method, order.request.url.path, query, body, order.wish.if_match, order.content_sha256]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


async def _record_refusal(runtime: Runtime, mutation: Mutation, error: TrimtabError) -> None:
    if mutation.is_dry_run or error.kind in {ErrorKind.UNAVAILABLE, ErrorKind.INTERNAL}:
        return
    outcome = "denied" if error.kind is ErrorKind.PERMISSION_DENIED else "failed"
    await runtime.context.db.write(lambda session: record(session, mutation, outcome=outcome, error=error), durable=False)


def _only_one(first: str | None, second: str | None) -> str:
    if first and second and first != second:
        raise InvalidRequest("request-id-twice", "request_id: given twice, with different values", field="request_id")
    return first or second or ""


def _version(if_match: str) -> int | None:
    if if_match in {"", "*"}:
        return None
    match = _ETAG.fullmatch(if_match)
    if match is None:
        raise InvalidRequest("etag-wrong", 'If-Match: an etag as resources show it, for example W/"3"', field="If-Match")
    return int(match[2])
