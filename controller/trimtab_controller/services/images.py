"""Images: imported once, then immutable; and the uploads they may come from."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Image, ImageReplica, Operation, Project, Role
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import pools
from trimtab_controller.services.authorise import require
from trimtab_controller.store import hosts, images, keyset, lookup, schema, templates
from trimtab_protos.errors import Conflict, InvalidRequest, NotFound

ANY_HOST = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class FromUpload:
    upload_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FromUrl:
    url: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FromHost:
    """A file in the import folder of a host's agent."""

    host: str
    file_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    name: str
    # disk or iso.
    kind: str
    # raw, qcow2 or iso: as declared; the agent refuses a file that is another.
    format: str
    source: FromUpload | FromUrl | FromHost
    # '' takes the default pool.
    pool: str
    is_shared: bool
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    replica: ImageReplica
    pool_name: str
    # '' on a shared pool.
    host_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageView:
    image: Image
    # '' for a shared one.
    project_name: str
    replicas: tuple[Replica, ...]


def create(
    session: Session,
    spec: ImageSpec,
    *,
    project: Project,
    allowed_url_hosts: tuple[str, ...],
    allowed_url_networks: tuple[str, ...] = (),
    actor: Actor,
    now: datetime,
) -> tuple[ImageView, Operation]:
    """Insert an image and accept its import. AlreadyExists where the name is taken.

    A URL's host must be one of `allowed_url_hosts`, at a public address or in one of `allowed_url_networks`.
    """
    if (spec.kind == "iso") != (spec.format == "iso"):
        raise InvalidRequest(
            "format-wrong", "format: an image of kind iso has the format iso, a disk has raw or qcow2", field="format"
        )
    if spec.is_shared:
        require(actor, Role.ADMIN, "")
    pool = pools.choose(session, spec.pool)
    source = _source(session, spec.source, project=project, allowed_url_hosts=allowed_url_hosts, actor=actor, now=now)
    if "url" in source and allowed_url_networks:
        source["allowed_networks"] = list(allowed_url_networks)
    project_id = "" if spec.is_shared else project.id
    image = images.insert(
        session,
        image_id=mint("img"),
        project_id=project_id,
        name=spec.name,
        kind=spec.kind,
        format=spec.format,
        source_sha256=str(source.get("sha256", "")),
        labels=spec.labels,
        now=now,
    )
    operation = accept(
        session,
        "image.import",
        subject_id=image.id,
        subject_name=image.name,
        project_id=project_id,
        params={"image_id": image.id, "pool_id": pool.id, "source": source},
        actor=actor,
        now=now,
    )
    return views(session, (image,))[0], operation


def ready_iso(session: Session, name_or_id: str, *, project: Project, field: str) -> Image:
    """Return the ISO image. InvalidRequest for a disk image, Conflict while it is not imported."""
    image = find(session, name_or_id, project=project)
    if image.kind != "iso":
        raise InvalidRequest(
            "image-not-an-iso",
            f"{field}: {image.name} is a disk image; give an ISO (`trimtab image list --filter kind=iso`)",
            field=field,
        )
    if image.state != "ready":
        raise Conflict(
            "image-not-ready", f"image {image.name} is {image.state}; see `trimtab image get {image.name}`", state=image.state
        )
    return image


def delete(
    session: Session, name_or_id: str, *, project: Project, expected_version: int | None, actor: Actor, now: datetime
) -> Operation:
    """Accept the removal of an image that no volume stands on. Conflict names those that do."""
    image = find(session, name_or_id, project=project)
    if image.project_id == "":
        require(actor, Role.ADMIN, "")
    clones = images.dependants(session, image.id)
    if clones:
        raise Conflict(
            "image-in-use",
            f"image {image.name} is the base of volumes {', '.join(clones)} "
            "(those of a deleted vm count for 24 h, or until `trimtab vm purge`)",
            image=image.name,
        )
    template = templates.of_image(session, image.id)
    if template is not None:
        raise Conflict(
            "image-in-use",
            f"image {image.name} belongs to template {template.name}, revision {template.revision}; "
            f"`trimtab template delete {template.name} --revision {template.revision}` removes both",
            image=image.name,
        )
    images.check_version(session, image.id, expected_version)
    return accept(
        session,
        "image.delete",
        subject_id=image.id,
        subject_name=image.name,
        project_id=image.project_id,
        params={"image_id": image.id},
        actor=actor,
        now=now,
    )


def find(session: Session, name_or_id: str, *, project: Project) -> Image:
    image = images.find(session, project.id, name_or_id)
    if image is None:
        raise NotFound("image-not-found", f"there is no image {name_or_id} in project {project.name}", image=name_or_id)
    return image


def get(session: Session, name_or_id: str, *, project: Project) -> ImageView:
    return views(session, (find(session, name_or_id, project=project),))[0]


def page(session: Session, page: keyset.Page, *, project: Project) -> tuple[tuple[ImageView, ...], tuple[str, str] | None]:
    found, next_after = images.page(session, page, project_id=project.id)
    return views(session, found), next_after


def views(session: Session, found: tuple[Image, ...]) -> tuple[ImageView, ...]:
    replicas = images.replicas_of(session, [image.id for image in found])
    every = [one for some in replicas.values() for one in some]
    names = lookup.names_in(
        session,
        {
            schema.pool: {one.pool_id for one in every},
            schema.host: {one.host_id for one in every},
            schema.project: {image.project_id for image in found},
        },
    )
    return tuple(
        ImageView(
            image=image,
            project_name=names.get(image.project_id, ""),
            replicas=tuple(
                Replica(
                    replica=one,
                    pool_name=names.get(one.pool_id, one.pool_id),
                    host_name=names.get(one.host_id, one.host_id),
                )
                for one in replicas[image.id]
            ),
        )
        for image in found
    )


def _source(
    session: Session,
    source: FromUpload | FromUrl | FromHost,
    *,
    project: Project,
    allowed_url_hosts: tuple[str, ...],
    actor: Actor,
    now: datetime,
) -> dict[str, object]:
    """Return the source as the saga takes it."""
    match source:
        case FromUpload():
            upload = images.find_upload(session, project.id, source.upload_id, now)
            if upload is None:
                raise NotFound(
                    "upload-not-found",
                    f"source.upload_id: there is no upload {source.upload_id} in this project (any more)",
                    field="source.upload_id",
                )
            return {"upload_id": upload.id, "size_bytes": upload.size_bytes}
        case FromUrl():
            _check_url(source.url, allowed_url_hosts)
            return {"url": source.url, "sha256": source.sha256}
        case FromHost():
            require(actor, Role.ADMIN, "")  # it reads a file of the host
            host = hosts.find(session, source.host)
            if host is None:
                raise NotFound("host-not-found", f"source.host: there is no host {source.host}", field="source.host")
            return {"host_id": host.id, "file_name": source.file_name}


def _check_url(url: str, allowed_hosts: tuple[str, ...]) -> None:
    """Refuse what no agent would fetch, early and by name. The agent resolves, pins and checks the address itself."""
    if not allowed_hosts:
        raise InvalidRequest(
            "url-import-off",
            "source.url: import from URLs is off here; upload the file, or have an administrator set image_url_hosts",
            field="source.url",
        )
    try:
        parts = urlsplit(url)
        host, has_login = parts.hostname or "", parts.username is not None
        _port = parts.port  # raises on a port that is none
    except ValueError as error:
        raise InvalidRequest("url-wrong", f"source.url: {error}", field="source.url") from error
    if parts.scheme != "https" or not host or has_login:
        raise InvalidRequest(
            "url-wrong",
            'source.url: an https URL without a login, for example "https://example.org/disk.qcow2"',
            field="source.url",
        )
    if ANY_HOST not in allowed_hosts and host not in allowed_hosts:
        raise InvalidRequest(
            "url-host-not-allowed", f"source.url: {host} is not among the allowed {', '.join(allowed_hosts)}", field="source.url"
        )
