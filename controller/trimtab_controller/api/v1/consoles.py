"""Consoles: a token for one session, and the websocket that it opens.

    POST /v1/projects/p1/vms/web1:console {"kind": "vnc"}      -> path, token
    GET  PATH  Upgrade: websocket  Sec-WebSocket-Protocol: trimtab-console, TOKEN

Browsers can set no header of a websocket but its subprotocols, and what is in a path gets into logs: so the token is one of those.
"""

from dataclasses import replace
from datetime import datetime
from typing import Annotated
from urllib.parse import urlsplit

import structlog
from fastapi import APIRouter, Request, WebSocket
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api import problems
from trimtab_controller.api.consoles import hang_up, relay
from trimtab_controller.api.fields import Body
from trimtab_controller.api.mutate import Order, answered, mutate
from trimtab_controller.api.params import Asked
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.resources.consoles import ConsoleTicket
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import client_address, requires
from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import consoles, vm_power
from trimtab_controller.services.authorise import Access, Scope, Unauthenticated
from trimtab_controller.services.consoles import Ending, Seat
from trimtab_controller.services.mutations import Answer, Mutation, record
from trimtab_protos.console_messages import ConsoleKind
from trimtab_protos.errors import PermissionDenied, TrimtabError, Unavailable

router = APIRouter(tags=["consoles"])
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
SUBPROTOCOL = "trimtab-console"
SOCKET_PATH = "/v1/consoles"
log = structlog.get_logger(__name__)


class ConsoleBody(Body):
    kind: Annotated[ConsoleKind, Field(examples=["serial"])] = ConsoleKind.SERIAL


@router.post("/v1/projects/{project}/vms/{name}:console", status_code=201, response_model=ConsoleTicket)
async def open_console(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: ConsoleBody | None = None
) -> Response:
    """Return a token for one session at the vm's console; it is good for a minute, once, while the vm stays where it is."""
    owner, kind = access.own_project, (body or ConsoleBody()).kind

    def work(session: Session, _actor: Actor, now: datetime) -> Answer:
        vm = vm_power.find(session, name, project=owner)
        made = consoles.create(session, vm, access, kind=kind, now=now)
        shown = ConsoleTicket(
            id=made.console.id,
            vm=vm.name,
            kind=kind,
            path=SOCKET_PATH,
            subprotocol=SUBPROTOCOL,
            token=made.token,
            expires_at=made.console.expires_at,
        )
        return answered(shown, status=201, stored=replace(shown, token=""))

    return await mutate(Order(request=request, access=access, wish=asked, verb="vm.console", body=body), work)


@router.websocket(SOCKET_PATH)
async def sit_at_console(websocket: WebSocket, _access: Annotated[Access, requires(Role.OPERATOR, Scope.CONSOLE)]) -> None:
    """Carry one session. Refused with problem details before the upgrade; ended with `CODE: sentence` after it."""
    runtime: Runtime = websocket.app.state.runtime
    request_id = mint("req")
    try:
        seat = await _enter(websocket, runtime, request_id)
    except TrimtabError as error:
        await websocket.send_denial_response(problems.of_error(error, request_id=request_id))
        return
    ending = Ending("console-broke", "the session broke; open the console again")
    runtime.open_consoles += 1
    try:
        ending = await _sit(websocket, runtime, seat)
    finally:
        runtime.open_consoles -= 1
        now = runtime.context.clock.now()
        await runtime.context.db.write(
            lambda session: consoles.leave(session, seat, ending, request_id=request_id, now=now), durable=False
        )


async def _enter(websocket: WebSocket, runtime: Runtime, request_id: str) -> Seat:
    runtime.address_rate.take(client_address(websocket), cost=1.0)
    _check_origin(websocket)
    if runtime.open_consoles >= runtime.context.settings.max_consoles:
        raise Unavailable("too-many-consoles", "this controller carries as many consoles as it may; try again")
    offered = websocket.scope.get("subprotocols", [])
    token = offered[1] if len(offered) == 2 and offered[0] == SUBPROTOCOL else ""
    now = runtime.context.clock.now()
    try:
        return await runtime.context.db.write(lambda session: consoles.enter(session, token, request_id=request_id, now=now))
    except TrimtabError as error:
        if isinstance(error, Unauthenticated):
            runtime.login_rate.take(client_address(websocket))
        await _record_denial(runtime, request_id, error)
        raise


async def _sit(websocket: WebSocket, runtime: Runtime, seat: Seat) -> Ending:
    console = seat.console
    try:
        line = await runtime.context.consoles.open_console(console.host_id, console.vm_id, console.kind)
    except TrimtabError as error:
        await websocket.send_denial_response(problems.of_error(error, request_id=console.id))
        return Ending(error.code, error.message)
    try:
        await websocket.accept(subprotocol=SUBPROTOCOL)
        ending = await relay(websocket, runtime, seat, line)
        await hang_up(websocket, ending)
    finally:
        await line.close()
    log.info("console session ended", console_id=console.id, vm_id=console.vm_id, cause=ending.code)
    return ending


def _check_origin(websocket: WebSocket) -> None:
    """Refuse a page of somebody else's: browsers send where a script came from, other clients send nothing."""
    origin = websocket.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != websocket.headers.get("host", ""):
        raise PermissionDenied("origin-refused", "consoles are opened by pages of this controller only")


async def _record_denial(runtime: Runtime, request_id: str, error: TrimtabError) -> None:
    denial = Mutation(
        actor=Actor(name="anonymous", request_id=request_id),
        verb="console.open",
        resource="consoles",
        project_id="",
        fingerprint="",
        is_dry_run=False,
        now=runtime.context.clock.now(),
    )
    await runtime.context.db.write(lambda session: record(session, denial, outcome="denied", error=error), durable=False)
