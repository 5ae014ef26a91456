"""Adopting domains of others, releasing vms, and what was changed by hand."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Bool, HostName, Name, RefOrNone
from trimtab_controller.api.mutate import Order, accepted, answered, mutate, prepared
from trimtab_controller.api.params import Asked, InRuntime
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, json_response
from trimtab_controller.api.resources.adoption import AdoptionAnswer, DiffResource, render_adoption, render_difference
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.runtime import Runtime
from trimtab_controller.api.security import requires
from trimtab_controller.api.v1.vm_verbs import run_verb
from trimtab_controller.core.drift_fields import Difference, differences
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import adoption, vm_power
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_controller.store import adoptions, describe, fleet
from trimtab_protos.adoption_messages import Described, DomainDescription
from trimtab_protos.errors import Conflict, DeadlineExceeded
from trimtab_protos.messages import DomainSpec

router = APIRouter(tags=["vms"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
_VM = "/v1/projects/{project}/vms/{name}"
_SOURCE = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", examples=["virbr0"])]


class AdoptBody(Body):
    """A domain of a host, by name or UUID. `networks` says what a bridge or libvirt network is to the fleet where it does not know."""

    host: HostName
    domain: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$", examples=["legacy-db"])]
    name: Name | None = None
    networks: Annotated[dict[_SOURCE, RefOrNone], Field(max_length=24, default_factory=dict, examples=[{"virbr0": "default"}])]


class ReleaseBody(Body):
    """Whether libvirt shall start the plain domain when its host boots."""

    autostart: Bool = False


class ReconcileBody(Body):
    """`accept`: the vm becomes as its domain is; `revert`: the domain as the vm shall be."""

    mode: Annotated[Literal["accept", "revert"], Field(examples=["revert"])]


@router.post("/v1/projects/{project}/vms:adopt", status_code=202, response_model=AdoptionAnswer)
async def adopt_vm(request: Request, runtime: InRuntime, access: ProjectOperator, asked: Asked, body: AdoptBody) -> Response:
    """Take a domain under control as it runs; with validate_only the answer lists what becomes of it and all that refuses."""
    owner = access.own_project
    spec = adoption.AdoptSpec(host=body.host, domain=body.domain, name=body.name or "", networks=body.networks)
    order = Order(request=request, access=access, wish=asked, verb="vm.adopt", body=body, name=body.name or body.domain)

    async def look() -> tuple[str, Described]:
        find = partial(adoption.find_host, name_or_id=body.host, actor=access.actor)
        host_id = await runtime.context.db.read(find)
        return host_id, await _ask(runtime, partial(runtime.context.agents.describe_domain, host_id, domain=body.domain))

    host_id, described = await prepared(order, look())

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        if asked.is_dry_run:
            planned = adoption.preview(session, spec, described.live, host_id, project=owner)
            if planned.refusals:
                return answered(AdoptionAnswer(adoption=render_adoption(described.live, planned, host=body.host)))
        _vm, operation, planned = adoption.adopt(session, spec, described.live, host_id, project=owner, actor=actor, now=now)
        shown = render_adoption(described.live, planned, host=body.host)
        if asked.is_dry_run:
            return answered(AdoptionAnswer(adoption=shown))
        return accepted(AdoptionAnswer(adoption=shown, operation=render(operation, project_name=owner.name)))

    return await mutate(order, work)


@router.post(f"{_VM}:release", status_code=202, response_model=OperationAnswer)
async def release_vm(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: ReleaseBody | None = None
) -> Response:
    """Make a vm a plain libvirt domain, which goes on as it is; its files stay, its record is a tombstone."""
    has_autostart = body.autostart if body else False
    return await run_verb(
        request, access, name, asked, body, "vm.release", lambda *parts: adoption.release(*parts, has_autostart=has_autostart)
    )


@router.get(f"{_VM}:diff", response_model=DiffResource)
async def diff_vm(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    """Compare a vm as it shall be with its domain as it runs and as it is stored."""
    looked = await _look(runtime, access, name)
    resource = DiffResource(
        vm=looked.vm_name,
        host=looked.host_name,
        is_drifted=bool(looked.differences),
        differences=tuple(render_difference(one) for one in looked.differences),
        is_original_in_force=looked.is_original_in_force,
    )
    return json_response(dump(resource))


@router.post(f"{_VM}:reconcile", status_code=202, response_model=OperationAnswer)
async def reconcile_vm(
    request: Request, runtime: InRuntime, access: ProjectOperator, name: NamePath, asked: Asked, body: ReconcileBody
) -> Response:
    """Take over what was changed by hand (`accept`), or put back what the vm shall be (`revert`)."""
    order = Order(request=request, access=access, wish=asked, verb="vm.reconcile", body=body)
    owner = access.own_project
    looked = await prepared(order, _look(runtime, access, name))
    return await run_verb(
        request,
        access,
        name,
        asked,
        body,
        "vm.reconcile",
        lambda session, vm, caller: adoption.reconcile(
            session, vm, caller, looked.differences, looked.live, project=owner, accept_as_is=body.mode == "accept"
        ),
    )


@dataclass(frozen=True, slots=True)
class _Looked:
    vm_name: str
    host_name: str
    differences: tuple[Difference, ...]
    live: DomainDescription
    is_original_in_force: bool


async def _look(runtime: Runtime, access: Access, name: str) -> _Looked:
    owner = access.own_project

    def read(session: Session) -> tuple[str, str, str, DomainSpec, bool]:
        vm = vm_power.find(session, name, project=owner)
        if not vm.host_id:
            raise Conflict("vm-not-placed", f"vm {vm.name} is on no host; start it with `trimtab vm start {vm.name}`")
        adopted = adoptions.find(session, vm.id)
        spec = describe.domain_spec(session, describe.read_vm(session, vm.id), vm.host_id)
        return vm.name, vm.host_id, fleet.name_of(session, vm.host_id), spec, adopted is not None and adopted.ended_at is None

    vm_name, host_id, host_name, spec, in_force = await runtime.context.db.read(read)
    seen = await _ask(runtime, partial(runtime.context.agents.describe_domain, host_id, vm_id=spec.vm_id))
    found = differences(spec, seen.live, seen.stored, is_original_in_force=in_force)
    return _Looked(vm_name, host_name, found, seen.live, in_force)


async def _ask(runtime: Runtime, question: Callable[[], Described]) -> Described:
    asking = asyncio.get_running_loop().run_in_executor(runtime.agent_threads, question)
    try:
        return await asyncio.wait_for(asking, runtime.context.settings.console_timeout_s)
    except TimeoutError as error:
        raise DeadlineExceeded("host-deadline", "the host did not answer in time; send the request again") from error
