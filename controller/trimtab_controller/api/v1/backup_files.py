"""Disks of backups as files: one operation that makes a host ready, then piece by piece."""

import asyncio
import base64
import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.mutate import Order, accepted, mutate
from trimtab_controller.api.params import Asked, InRuntime
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, json_response
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import backup_export
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_protos.errors import DeadlineExceeded

router = APIRouter(tags=["backups"])
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
PIECE_BYTES = 1 << 20
# Storage that is far away; a piece is asked for again.
PIECE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceResource:
    content_base64: str
    # Of the content, to be compared by whoever puts the file together.
    sha256: str
    # So many bytes of zeros come instead of content.
    zeros: int
    # Of the whole file.
    size_bytes: int


@router.post("/v1/projects/{project}/backups/{name}:export", status_code=202, response_model=OperationAnswer)
async def export_backup(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Have a host hand out the backup's disks as files; read them with `…/backups/{name}/file`."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = backup_export.export(session, name, project=owner, actor=actor, now=now)
        return accepted(OperationAnswer(operation=render(operation, project_name=owner.name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="backup.export"), work)


@router.get("/v1/projects/{project}/backups/{name}/file", response_model=PieceResource)
async def read_backup_file(
    runtime: InRuntime,
    access: ProjectOperator,
    name: NamePath,
    disk: Annotated[
        str, Query(pattern=r"^([a-z]{2,8})?$", examples=["vda"], description="As the vm names it; left out: the first.")
    ] = "",
    image_format: Annotated[Literal["qcow2", "raw"], Query(alias="format")] = "qcow2",
    offset: Annotated[int, Query(ge=0, le=1 << 50, examples=[1 << 20])] = 0,
) -> Response:
    """Return what the file of a disk holds from an offset on, at most 1 MiB of it."""
    owner = access.own_project
    host_id, place = await runtime.context.db.read(lambda session: backup_export.place_of(session, name, disk, project=owner))
    reading = asyncio.get_running_loop().run_in_executor(
        runtime.agent_threads, runtime.context.agents.read_backup, host_id, place, image_format, offset, PIECE_BYTES
    )
    try:
        piece = await asyncio.wait_for(reading, PIECE_TIMEOUT_S)
    except TimeoutError as error:
        raise DeadlineExceeded("backup-read-deadline", f"the host did not read backup {name} in time; ask again") from error
    resource = PieceResource(
        content_base64=base64.b64encode(piece.content).decode(),
        sha256=hashlib.sha256(piece.content).hexdigest(),
        zeros=piece.zeros,
        size_bytes=piece.size_bytes,
    )
    return json_response(dump(resource))
