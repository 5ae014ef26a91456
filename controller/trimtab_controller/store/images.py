"""Images in SQL: rows, lists, what depends on them, and the uploads they come from. Replicas: `image_replicas.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from trimtab_controller.core.model import Image, ImageReplica
from trimtab_controller.store import keyset, lookup, schema
from trimtab_controller.store.rows import build, columns_of
from trimtab_controller.store.volumes import holds_bytes

_table = schema.image

FILTERS: keyset.Filters = {
    "name": keyset.equals(_table.c.name),
    "state": keyset.equals(_table.c.state),
    "kind": keyset.equals(_table.c.kind),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Bytes that a user sent ahead of an import; they lie in the spool of one controller until they expire."""

    id: str
    project_id: str
    gateway_address: str
    size_bytes: int
    sha256: str
    expires_at: datetime
    created_at: datetime


def insert(
    session: Session,
    *,
    image_id: str,
    project_id: str,
    name: str,
    kind: str,
    format: str,
    source_sha256: str,
    labels: Mapping[str, str],
    now: datetime,
) -> Image:
    """Insert an image that is being imported. AlreadyExists where the name is taken in the project ('' for shared ones)."""
    return lookup.insert_named(
        session,
        _table,
        Image,
        "image",
        id=image_id,
        project_id=project_id,
        name=name,
        kind=kind,
        format=format,
        source_sha256=source_sha256,
        labels=dict(labels),
        state="importing",
        created_at=now,
    )


def find(session: Session, project_id: str, name_or_id: str) -> Image | None:
    """Return the project's image of that name or id, else a shared one."""
    return lookup.find(session, _table, Image, name_or_id, project_ids=_visible(project_id))


def page(session: Session, page: keyset.Page, *, project_id: str) -> tuple[tuple[Image, ...], tuple[str, str] | None]:
    """Return the project's images and the shared ones ('' alone: the shared ones)."""
    query = sa.select(*columns_of(_table, Image)).where(
        _table.c.deleted_at.is_(None), _table.c.project_id.in_(_visible(project_id))
    )
    found = keyset.fetch(session, query, _table, page, filters=FILTERS)
    return tuple(build(Image, row) for row in found.rows), found.next_after


def replicas_of(session: Session, image_ids: Sequence[str]) -> dict[str, tuple[ImageReplica, ...]]:
    """Return where each image is; one query."""
    table = schema.image_replica
    found: dict[str, list[ImageReplica]] = {image_id: [] for image_id in image_ids}
    query = sa.select(*columns_of(table, ImageReplica)).where(table.c.image_id.in_(image_ids))
    for row in session.execute(query.order_by(table.c.pool_id, table.c.host_id)):
        found[row.image_id].append(build(ImageReplica, row))
    return {image_id: tuple(replicas) for image_id, replicas in found.items()}


def dependants(session: Session, image_id: str, *, limit: int = 5) -> tuple[str, ...]:
    """Return the names of volumes that are linked clones of the image, and of vms that have it in their drive.

    Deleted ones count until they are purged. Beyond `limit` the others are not named, and said to be there.
    """
    table, vm = schema.volume, schema.vm
    clones = sa.select(table.c.name).where(table.c.base_image_id == image_id, holds_bytes())
    is_inserted = sa.or_(vm.c.cdrom_image_id == image_id, vm.c.drivers_image_id == image_id)
    drives = sa.select(vm.c.name).where(is_inserted, vm.c.purged_at.is_(None))
    found = list(session.scalars(clones.order_by(table.c.name).limit(limit + 1)))
    found += [f"{name}'s CD-ROM" for name in session.scalars(drives.order_by(vm.c.name).limit(limit + 1))]
    return (*found[:limit], *(("and others",) if len(found) > limit else ()))


def check_version(session: Session, image_id: str, expected_version: int | None) -> None:
    """Raise the version; Conflict `stale-etag` where it is not the expected one."""
    lookup.update_version(session, _table, "the image", image_id, expected_version=expected_version)


# --- uploads ---------------------------------------------------------------------------------------------------------------


def insert_upload(session: Session, upload: Upload) -> None:
    values = {name: getattr(upload, name) for name in schema.upload.c.keys()}  # noqa: SIM118 - a column collection
    session.execute(schema.upload.insert().values(**values))


def find_upload(session: Session, project_id: str, upload_id: str, now: datetime) -> Upload | None:
    """Return the project's upload unless it expired."""
    table = schema.upload
    query = sa.select(table).where(table.c.id == upload_id, table.c.project_id == project_id, table.c.expires_at > now)
    row = session.execute(query).one_or_none()
    return build(Upload, row) if row else None


def spooled_bytes(session: Session, gateway_address: str) -> int:
    """Return how much of one controller's spool is taken."""
    table = schema.upload
    query = sa.select(sa.func.coalesce(sa.func.sum(table.c.size_bytes), 0)).where(table.c.gateway_address == gateway_address)
    return int(session.execute(query).scalar_one())


def expired_uploads(session: Session, gateway_address: str, now: datetime) -> tuple[str, ...]:
    """Return ids of one controller's uploads that expired and that no live import reads."""
    upload, operation = schema.upload, schema.operation
    query = sa.select(upload.c.id).where(upload.c.gateway_address == gateway_address, upload.c.expires_at <= now)
    expired = set(session.scalars(query))
    if not expired:
        return ()
    importing = sa.select(operation.c.params).where(operation.c.kind == "image.import", operation.c.ended_at.is_(None))
    read = {(params.get("source") or {}).get("upload_id") for params in session.scalars(importing)}
    return tuple(sorted(expired - read))


def known_uploads(session: Session, upload_ids: Sequence[str]) -> frozenset[str]:
    """Return those of the ids that have a row."""
    return frozenset(session.scalars(sa.select(schema.upload.c.id).where(schema.upload.c.id.in_(upload_ids))))


def delete_uploads(session: Session, upload_ids: Sequence[str]) -> None:
    session.execute(schema.upload.delete().where(schema.upload.c.id.in_(upload_ids)))


def _visible(project_id: str) -> tuple[str, ...]:
    return (project_id, "") if project_id else ("",)
