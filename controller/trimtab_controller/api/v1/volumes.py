"""Volumes of a project."""

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import Body, Bool, DiskBytes, Name, Ref, RefOrNone
from trimtab_controller.api.mutate import Order, accepted, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.resources.storage import VolumeAnswer, VolumeResource, render_volume
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Operation, Role
from trimtab_controller.services import volume_moves, volumes
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer

router = APIRouter(tags=["volumes"])
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]


class VolumeBody(Body):
    """Empty with `size_bytes`, or a linked clone of `image`, at least as large."""

    name: Name
    size_bytes: DiskBytes | None = None
    pool: RefOrNone = ""
    format: Literal["raw", "qcow2", ""] = ""
    image: RefOrNone = ""
    # Its bytes lie encrypted (LUKS); from an image it is an independent copy then.
    is_encrypted: Bool = False
    # Of an iSCSI pool: which of the target's LUNs it is. It keeps what is on it.
    lun: Annotated[int, Field(strict=True, ge=0, le=255, examples=[1])] | None = None


class VolumeLimitBody(Body):
    """Reads and writes together; 0 takes a limit away, what is left out stays."""

    iops: Annotated[int, Field(strict=True, ge=0, le=10_000_000, examples=[500])] | None = None
    bandwidth_mib_s: Annotated[int, Field(strict=True, ge=0, le=1_000_000, examples=[100])] | None = None


class VolumeSizeBody(Body):
    size_bytes: DiskBytes


class VolumeMoveBody(Body):
    to_pool: Ref
    # 0: as fast as the storage.
    bandwidth_mib_s: Annotated[int, Field(strict=True, ge=0, le=1_000_000, examples=[100])] = 0


@router.get("/v1/projects/{project}/volumes", response_model=ListOf[VolumeResource])
async def list_volumes(runtime: InRuntime, access: ProjectViewer, query: Listing) -> Response:
    """List the project's volumes; filter by name, vm, pool, image, state."""
    owner = access.own_project
    found, after = await runtime.context.db.read(lambda session: volumes.page(session, query.page, project=owner))
    return json_response(dump_list(VolumeResource, [render_volume(one) for one in found], query.next_token(after)))


@router.post("/v1/projects/{project}/volumes", status_code=202, response_model=VolumeAnswer)
async def create_volume(
    request: Request, runtime: InRuntime, access: ProjectOperator, body: VolumeBody, asked: Asked
) -> Response:
    owner, box = access.own_project, runtime.context.secrets
    spec = volumes.VolumeSpec(
        name=body.name,
        size_bytes=body.size_bytes,
        pool=body.pool,
        format=body.format,
        image=body.image,
        is_encrypted=body.is_encrypted,
        unit="" if body.lun is None else str(body.lun),
    )

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = volumes.create(session, spec, project=owner, actor=actor, now=now, box=box)
        shown = render(operation, project_name=owner.name)
        return accepted(VolumeAnswer(operation=shown, volume=render_volume(view)))

    order = Order(request=request, access=access, wish=asked, verb="volume.create", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/volumes/{name}", response_model=VolumeResource)
async def get_volume(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    owner = access.own_project
    view = await runtime.context.db.read(lambda session: volumes.get(session, name, project=owner))
    return json_response(dump(render_volume(view)), etag=etag_of(view.volume.version))


@router.post("/v1/projects/{project}/volumes/{name}:resize", status_code=202, response_model=OperationAnswer)
async def resize_volume(
    request: Request, access: ProjectOperator, name: NamePath, body: VolumeSizeBody, asked: Asked
) -> Response:
    """Grow a volume, under a running guest too; a volume never shrinks."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = volumes.resize(
            session, name, body.size_bytes, project=owner, expected_version=asked.if_match, actor=actor, now=now
        )
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="volume.resize", body=body), work)


@router.post("/v1/projects/{project}/volumes/{name}:move", status_code=202, response_model=OperationAnswer)
async def move_volume(request: Request, access: ProjectOperator, name: NamePath, body: VolumeMoveBody, asked: Asked) -> Response:
    """Bring a volume to another pool, under a running guest too; a linked clone becomes independent."""
    owner = access.own_project
    wish = volume_moves.MoveWish(to_pool=body.to_pool, bandwidth_mib_s=body.bandwidth_mib_s)

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = volume_moves.move(session, name, wish, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="volume.move", body=body), work)


@router.post("/v1/projects/{project}/volumes/{name}:undelete", status_code=202, response_model=OperationAnswer)
async def undelete_volume(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Bring a deleted volume back within 24 h."""
    return await _run_on_deleted(
        Order(request=request, access=access, wish=asked, verb="volume.undelete"), name, volumes.undelete
    )


@router.post("/v1/projects/{project}/volumes/{name}:purge", status_code=202, response_model=OperationAnswer)
async def purge_volume(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Remove a deleted volume's bytes now, before its 24 h are over."""
    return await _run_on_deleted(Order(request=request, access=access, wish=asked, verb="volume.purge"), name, volumes.purge)


async def _run_on_deleted(order: Order, name: str, act: Callable[..., Operation]) -> Response:
    owner = order.access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = act(session, name, project=owner, expected_version=order.wish.if_match, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(order, work)


@router.post("/v1/projects/{project}/volumes/{name}:limit", status_code=202, response_model=OperationAnswer)
async def limit_volume(
    request: Request, access: ProjectOperator, name: NamePath, asked: Asked, body: VolumeLimitBody
) -> Response:
    """Limit how fast a guest may use a volume, at once where it runs."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = volumes.limit(
            session,
            name,
            iops=body.iops,
            bandwidth_mib_s=body.bandwidth_mib_s,
            project=owner,
            expected_version=asked.if_match,
            actor=actor,
            now=now,
        )
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="volume.limit", body=body), work)


@router.delete("/v1/projects/{project}/volumes/{name}", status_code=202, response_model=OperationAnswer)
async def delete_volume(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Hide a volume that no vm has; `:undelete` brings it back within 24 h, then its bytes go."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = volumes.delete(session, name, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="volume.delete"), work)
