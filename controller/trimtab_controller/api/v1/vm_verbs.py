"""The verbs of a vm, its explanation and its console log."""

import asyncio
import base64
from collections.abc import Callable
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Bool, HostName, TimeoutS
from trimtab_controller.api.mutate import Order, accepted, mutate
from trimtab_controller.api.params import Asked, InRuntime
from trimtab_controller.api.paths import HostQuery, NamePath
from trimtab_controller.api.render import dump, json_response
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.resources.vms import ConsoleResource, ExplanationResource, render_decision
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Operation, Role, Vm
from trimtab_controller.services import placement_why, vm_power, vm_views
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_controller.services.vm_power import Caller
from trimtab_protos.errors import Conflict, DeadlineExceeded

router = APIRouter(tags=["vms"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
_VM = "/v1/projects/{project}/vms/{name}"
CONSOLE_BYTES_MAX = 256 * 1024


class StartBody(Body):
    to_host: HostName | None = None


class StopBody(Body):
    """The guest is asked; past `timeout_s` its power is cut. `force` cuts it at once, whatever else is under way."""

    force: Bool = False
    timeout_s: TimeoutS = 60


class RebootBody(Body):
    force: Bool = False


class MigrateBody(Body):
    """The scheduler chooses the target unless `to_host` does; 0 leaves a bound to the defaults."""

    to_host: HostName | None = None
    bandwidth_mib_s: Annotated[int, Field(strict=True, ge=0, le=1_000_000, examples=[500])] = 0
    auto_converge: Bool = False
    allow_postcopy: Bool = False
    timeout_s: Annotated[int, Field(strict=True, ge=0, le=7 * 86400, examples=[600])] = 0


class NoBody(Body):
    """Nothing but a request id."""


Verb = Callable[[Session, Vm, Caller], Operation]


async def run_verb(
    request: Request, access: Access, name: str, asked: Asked, body: Body | None, verb: str, act: Verb
) -> Response:
    """Find the vm, accept the operation, answer 202."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        vm = vm_power.find(session, name, project=owner, with_deleted=verb in {"vm.undelete", "vm.purge"})
        operation = act(session, vm, Caller(actor=actor, expected_version=asked.if_match, now=now))
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb=verb, body=body), work)


@router.post(f"{_VM}:start", status_code=202, response_model=OperationAnswer)
async def start_vm(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: StartBody | None = None
) -> Response:
    """Place and start a stopped vm; one that runs stays as it is."""
    to_host = (body.to_host or "") if body else ""
    return await run_verb(request, access, name, asked, body, "vm.start", lambda *parts: vm_power.start(*parts, to_host=to_host))


@router.post(f"{_VM}:stop", status_code=202, response_model=OperationAnswer)
async def stop_vm(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: StopBody | None = None
) -> Response:
    """Stop a vm; it keeps its disks and gives its compute back."""
    given = body or StopBody()
    return await run_verb(
        request,
        access,
        name,
        asked,
        body,
        "vm.stop",
        lambda *parts: vm_power.stop(*parts, force=given.force, timeout_s=given.timeout_s),
    )


@router.post(f"{_VM}:reboot", status_code=202, response_model=OperationAnswer)
async def reboot_vm(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: RebootBody | None = None
) -> Response:
    """Ask the guest to reboot, or reset it with `force`."""
    is_forced = body.force if body else False
    return await run_verb(
        request, access, name, asked, body, "vm.reboot", lambda *parts: vm_power.reboot(*parts, force=is_forced)
    )


@router.post(f"{_VM}:pause", status_code=202, response_model=OperationAnswer)
async def pause_vm(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: NoBody | None = None
) -> Response:
    """Freeze the guest's vcpus; its memory stays."""
    return await run_verb(request, access, name, asked, body, "vm.pause", vm_power.pause)


@router.post(f"{_VM}:resume", status_code=202, response_model=OperationAnswer)
async def resume_vm(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: NoBody | None = None
) -> Response:
    return await run_verb(request, access, name, asked, body, "vm.resume", vm_power.resume)


@router.post(f"{_VM}:migrate", status_code=202, response_model=OperationAnswer)
async def migrate_vm(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: MigrateBody | None = None
) -> Response:
    """Move a running vm to another host without stopping it."""
    given = body or MigrateBody()
    spec = vm_power.MigrateSpec(
        to_host=given.to_host or "",
        bandwidth_mib_s=given.bandwidth_mib_s,
        auto_converge=given.auto_converge,
        allow_postcopy=given.allow_postcopy,
        timeout_s=given.timeout_s,
    )
    return await run_verb(
        request, access, name, asked, body, "vm.migrate", lambda session, vm, caller: vm_power.migrate(session, vm, caller, spec)
    )


@router.post(f"{_VM}:undelete", status_code=202, response_model=OperationAnswer)
async def undelete_vm(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: NoBody | None = None
) -> Response:
    """Bring a deleted vm back, stopped, with its disks."""
    return await run_verb(request, access, name, asked, body, "vm.undelete", vm_power.undelete)


@router.post(f"{_VM}:purge", status_code=202, response_model=OperationAnswer)
async def purge_vm(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: NoBody | None = None
) -> Response:
    """Remove a deleted vm for good, before its 24 h are over: its disks, addresses and quota are free again."""
    return await run_verb(request, access, name, asked, body, "vm.purge", vm_power.purge)


@router.get(f"{_VM}:explain", response_model=ExplanationResource)
async def explain_vm(runtime: InRuntime, access: ProjectViewer, name: NamePath, why_not: HostQuery = "") -> Response:
    """Tell why the vm is where it is, host by host; `why_not` adds a sentence about one host."""
    owner = access.own_project

    def read(session: Session) -> ExplanationResource:
        vm = vm_power.find(session, name, project=owner, with_deleted=True)
        explained = vm_views.explain(session, vm, project=owner)
        sentence = placement_why.why_not(session, vm, explained.decision, why_not) if why_not else ""
        return render_decision(
            explained.decision,
            vm_name=vm.name,
            host_name=explained.host_name,
            decided_at=explained.decided_at,
            fleet_revision=explained.fleet_revision,
            why_not=sentence,
        )

    return json_response(dump(await runtime.context.db.read(read)))


@router.get(f"{_VM}/console", response_model=ConsoleResource)
async def read_console(
    runtime: InRuntime,
    access: ProjectViewer,
    name: NamePath,
    offset: Annotated[
        int, Query(ge=-(1 << 40), le=1 << 40, examples=[-4096], description="From here; negative: from the end.")
    ] = 0,
    max_bytes: Annotated[int, Query(ge=1, le=CONSOLE_BYTES_MAX, examples=[4096])] = 64 * 1024,
) -> Response:
    """Read the serial log of a vm from its host."""
    owner, settings = access.own_project, runtime.context.settings
    vm = await runtime.context.db.read(lambda session: vm_power.find(session, name, project=owner))
    if not vm.host_id:
        raise Conflict("vm-not-placed", f"vm {vm.name} is on no host; start it with `trimtab vm start {vm.name}`")
    reading = asyncio.get_running_loop().run_in_executor(
        runtime.agent_threads, runtime.context.agents.read_console, vm.host_id, vm.id, offset, max_bytes
    )
    try:
        content, next_offset = await asyncio.wait_for(reading, settings.console_timeout_s)
    except TimeoutError as error:
        raise DeadlineExceeded("console-deadline", f"the host of vm {vm.name} did not answer in time") from error
    resource = ConsoleResource(content_base64=base64.b64encode(content).decode(), next_offset=next_offset)
    return json_response(dump(resource))
