"""Images and the uploads they come from."""

import re
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Request
from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from trimtab_controller.api.fields import SHA256_EXAMPLE, Body, Bool, HostName, Labels, Name, Part, RefOrNone, Sha256
from trimtab_controller.api.mutate import Order, accepted, answered, mutate
from trimtab_controller.api.params import Asked, InRuntime, Listing
from trimtab_controller.api.paths import NamePath
from trimtab_controller.api.render import dump, dump_list, etag_of, json_response
from trimtab_controller.api.resources.common import ListOf
from trimtab_controller.api.resources.operations import OperationAnswer, render
from trimtab_controller.api.resources.storage import ImageAnswer, ImageResource, UploadResource, render_image
from trimtab_controller.api.security import requires
from trimtab_controller.core.model import Actor, Role
from trimtab_controller.services import images
from trimtab_controller.services.authorise import Access, Scope
from trimtab_controller.services.mutations import Answer
from trimtab_controller.store import images as image_store
from trimtab_protos.errors import InvalidRequest

router = APIRouter(tags=["images"])
# Bodies of this one route are streamed and have a bound of their own.
UPLOAD_PATH = "/v1/projects/{project}/uploads"
ProjectViewer = Annotated[Access, requires(Role.VIEWER, Scope.PROJECT)]
ProjectOperator = Annotated[Access, requires(Role.OPERATOR, Scope.PROJECT)]
_SHA256 = re.compile(r"[0-9a-f]{64}")


class SourceBody(Part):
    """An upload; or an https URL on an allowed host, with the checksum of the file; or a file in a host's import folder."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"upload_id": "up-01hf7y2m3n4p5q6r7s8t9v0wxy"}]})

    upload_id: Annotated[str, Field(pattern=r"^up-[0-9a-z]{26}$", examples=["up-01hf7y2m3n4p5q6r7s8t9v0wxy"])] | None = None
    url: (
        Annotated[str, Field(pattern=r"^https://[!-~]+$", max_length=2000, examples=["https://example.org/disk.qcow2"])] | None
    ) = None
    sha256: Sha256 | None = None
    host: HostName | None = None
    file_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$", examples=["disk.qcow2"])] | None = None

    def source(self) -> images.FromUpload | images.FromUrl | images.FromHost:
        """Return the one source. InvalidRequest where it is none, half of one, or more than one."""
        match (self.upload_id, self.url, self.sha256, self.host, self.file_name):
            case (str() as upload_id, None, None, None, None):
                return images.FromUpload(upload_id=upload_id)
            case (None, str() as url, str() as sha256, None, None):
                return images.FromUrl(url=url, sha256=sha256)
            case (None, None, None, str() as host, str() as file_name):
                return images.FromHost(host=host, file_name=file_name)
        raise InvalidRequest("source-wrong", "source: give upload_id, or url and sha256, or host and file_name", field="source")


class ImageBody(Body):
    name: Name
    kind: Literal["disk", "iso"] = "disk"
    format: Literal["raw", "qcow2", "iso"]
    source: SourceBody
    pool: RefOrNone = ""
    is_shared: Bool = False
    labels: Labels = Field(default_factory=dict)

    def spec(self) -> images.ImageSpec:
        return images.ImageSpec(
            name=self.name,
            kind=self.kind,
            format=self.format,
            source=self.source.source(),
            pool=self.pool,
            is_shared=self.is_shared,
            labels=self.labels,
        )


@router.get("/v1/projects/{project}/images", response_model=ListOf[ImageResource])
async def list_images(runtime: InRuntime, access: ProjectViewer, query: Listing) -> Response:
    """List the project's images and the shared ones; filter by name, state, kind."""
    owner = access.own_project
    found, after = await runtime.context.db.read(lambda session: images.page(session, query.page, project=owner))
    return json_response(dump_list(ImageResource, [render_image(one) for one in found], query.next_token(after)))


@router.post("/v1/projects/{project}/images", status_code=202, response_model=ImageAnswer)
async def import_image(request: Request, runtime: InRuntime, access: ProjectOperator, body: ImageBody, asked: Asked) -> Response:
    """Import an image from an upload, an https URL, or a file on a host (administrators of the fleet)."""
    owner, settings = access.own_project, runtime.context.settings

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        view, operation = images.create(
            session,
            body.spec(),
            project=owner,
            allowed_url_hosts=settings.image_url_hosts,
            allowed_url_networks=settings.image_url_networks,
            actor=actor,
            now=now,
        )
        shown = render(operation, project_name=view.project_name)
        return accepted(ImageAnswer(operation=shown, image=render_image(view)))

    order = Order(request=request, access=access, wish=asked, verb="image.import", body=body, name=body.name)
    return await mutate(order, work)


@router.get("/v1/projects/{project}/images/{name}", response_model=ImageResource)
async def get_image(runtime: InRuntime, access: ProjectViewer, name: NamePath) -> Response:
    owner = access.own_project
    view = await runtime.context.db.read(lambda session: images.get(session, name, project=owner))
    return json_response(dump(render_image(view)), etag=etag_of(view.image.version))


@router.delete("/v1/projects/{project}/images/{name}", status_code=202, response_model=OperationAnswer)
async def delete_image(request: Request, access: ProjectOperator, name: NamePath, asked: Asked) -> Response:
    """Remove an image that no volume stands on."""
    owner = access.own_project

    def work(session: Session, actor: Actor, now: datetime) -> Answer:
        operation = images.delete(session, name, project=owner, expected_version=asked.if_match, actor=actor, now=now)
        project_name = owner.name if operation.project_id else ""
        return accepted(OperationAnswer(operation=render(operation, project_name=project_name)))

    return await mutate(Order(request=request, access=access, wish=asked, verb="image.delete"), work)


@router.post(
    UPLOAD_PATH,
    status_code=201,
    response_model=UploadResource,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload(
    request: Request,
    runtime: InRuntime,
    access: ProjectOperator,
    asked: Asked,
    x_content_sha256: Annotated[
        str, Header(max_length=64, examples=[SHA256_EXAMPLE], description="SHA-256 of the body, hexadecimal.")
    ] = "",
) -> Response:
    """Store the raw body for an import; it expires after a day. Content-Length is required."""
    size_bytes = _content_length(request, runtime.context.settings.upload_max_bytes)
    checksum = x_content_sha256.lower()
    if checksum and not _SHA256.fullmatch(checksum):
        raise InvalidRequest("checksum-wrong", "X-Content-SHA256: 64 hexadecimal digits", field="X-Content-SHA256")
    spool = runtime.spool
    stored = await spool.receive(request.stream(), project_id=access.project_id, size_bytes=size_bytes, sha256=checksum)

    def work(session: Session, _actor: Actor, _now: datetime) -> Answer:
        image_store.insert_upload(session, stored)
        resource = UploadResource(
            upload_id=stored.id, size_bytes=stored.size_bytes, sha256=stored.sha256, expires_at=stored.expires_at
        )
        return answered(resource, status=201)

    is_kept = False
    try:
        order = Order(
            request=request, access=access, wish=asked, verb="upload.create", name=stored.id, content_sha256=stored.sha256
        )
        response = await mutate(order, work)
        is_kept = stored.id.encode() in bytes(response.body) and not asked.is_dry_run
        return response
    finally:
        if not is_kept:  # refused, a dry run, or the answer to a repeat, which names the earlier upload
            await spool.drop(stored.id)


def _content_length(request: Request, most_bytes: int) -> int:
    text = request.headers.get("content-length", "")
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise InvalidRequest("length-required", "Content-Length: say how many bytes come", field="Content-Length")
    size_bytes = int(text)
    if size_bytes == 0:
        raise InvalidRequest("upload-empty", "Content-Length: an upload of 0 bytes is no image", field="Content-Length")
    if size_bytes > most_bytes:
        raise InvalidRequest("body-too-large", f"Content-Length: at most {most_bytes} bytes", field="Content-Length")
    return size_bytes
