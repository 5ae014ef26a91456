"""Snapshots of a vm: a tree, with a mark where the vm is."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import HOST_NAME_PATTERN, Body, Bool, Name
from trimtab_controller.api.params import Asked, InRuntime
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer
from trimtab_controller.api.resources.snapshots import SnapshotResource, render_snapshot
from trimtab_controller.api.security import requires
from trimtab_controller.api.v1.vm_verbs import run_verb
from trimtab_controller.core.model import Operation, Role, Snapshot, Vm
from trimtab_controller.services import snapshots, vm_power
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.vm_power import Caller

router = APIRouter(tags=["snapshots"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
SnapshotPath = Annotated[
    str, Path(pattern=HOST_NAME_PATTERN, max_length=63, examples=["before-upgrade"], description="Name or id of the snapshot.")
]
_SNAPSHOTS = "/v1/projects/{project}/vms/{name}/snapshots"


class SnapshotBody(Body):
    """The disks at one instant, frozen by the guest's agent where it has one; `has_memory` keeps what it is doing as well."""

    name: Name
    has_memory: Bool = False


class RevertBody(Body):
    """`disk_only` leaves a kept memory aside: the guest boots."""

    disk_only: Bool = False


@router.get(_SNAPSHOTS, response_model=ListOf[SnapshotResource])
async def list_snapshots(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    """List the vm's snapshots, each after the one that it began from; a vm has few, so there are no pages."""
    owner = access.own_project

    def read(session: Session) -> list[SnapshotResource]:
        vm = vm_power.find(session, name, project=owner)
        return [render_snapshot(one, vm_name=vm.name) for one in snapshots.views(session, vm)]

    return json_response(dump_list(SnapshotResource, await runtime.context.db.read(read), ""))


@router.post(_SNAPSHOTS, status_code=202, response_model=OperationAnswer)
async def create_snapshot(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: SnapshotBody
) -> Response:
    """Keep the vm's disks, and its memory with `has_memory`, as they are at one instant."""

    def act(session: Session, vm: Vm, caller: Caller) -> Operation:
        return snapshots.create(session, vm, caller, name=body.name, has_memory=body.has_memory)

    return await run_verb(request, access, name, asked, body, "snapshot.create", act)


@router.get(f"{_SNAPSHOTS}/{{snapshot}}", response_model=SnapshotResource)
async def get_snapshot(runtime: InRuntime, access: ProjectViewer, name: NamePath, snapshot: SnapshotPath) -> Response:
    owner = access.own_project

    def read(session: Session) -> SnapshotResource:
        vm = vm_power.find(session, name, project=owner)
        wanted = snapshots.find(session, vm, snapshot).id
        view = next(one for one in snapshots.views(session, vm) if one.snapshot.id == wanted)
        return render_snapshot(view, vm_name=vm.name)

    return json_response(dump(await runtime.context.db.read(read)))


@router.post(f"{_SNAPSHOTS}/{{snapshot}}:revert", status_code=202, response_model=OperationAnswer)
async def revert_snapshot(
    request: Request,
    access: ProjectOperator,
    name: NamePath,
    snapshot: SnapshotPath,
    asked: Asked,
    body: RevertBody | None = None,
) -> Response:
    """Let the vm go back: what it wrote since is given up, unless another snapshot keeps it."""
    given = body or RevertBody()
    act = _on(snapshot, lambda session, vm, caller, one: snapshots.revert(session, vm, caller, one, disk_only=given.disk_only))
    return await run_verb(request, access, name, asked, body, "snapshot.revert", act)


@router.delete(f"{_SNAPSHOTS}/{{snapshot}}", status_code=202, response_model=OperationAnswer)
async def delete_snapshot(
    request: Request, access: ProjectOperator, name: NamePath, snapshot: SnapshotPath, asked: Asked
) -> Response:
    """Give a snapshot up; what only it needed is merged while the guest runs."""
    return await run_verb(request, access, name, asked, None, "snapshot.delete", _on(snapshot, snapshots.delete))


def _on(name: str, act: Callable[[Session, Vm, Caller, Snapshot], Operation]) -> Callable[[Session, Vm, Caller], Operation]:
    return lambda session, vm, caller: act(session, vm, caller, snapshots.find(session, vm, name))
