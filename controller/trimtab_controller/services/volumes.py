"""Volumes that are made apart from a vm."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from trimtab_controller.clock import mint
from trimtab_controller.core.model import Actor, Image, Operation, Pool, Project, Volume
from trimtab_controller.operations.accept import accept
from trimtab_controller.services import images, layered, pools, quota, volume_keys
from trimtab_controller.store import describe, keyset, lookup, schema, volume_claims, volumes
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NoCapacity, NotFound
from trimtab_protos.messages import DiskFormat, PoolKind

SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSpec:
    name: str
    # None: the image's size.
    size_bytes: int | None
    pool: str
    # raw or qcow2; '' takes qcow2.
    format: str
    # '' for an empty volume.
    image: str
    is_encrypted: bool = False
    # Of an iSCSI pool: which LUN it is.
    unit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeView:
    volume: Volume
    project_name: str
    pool_name: str
    host_name: str
    image_name: str
    vm_name: str
    # Of a volume that moves.
    other_pool_name: str = ""


def create(
    session: Session,
    spec: VolumeSpec,
    *,
    project: Project,
    actor: Actor,
    now: datetime,
    box: volume_keys.Sealer = volume_keys.NO_BOX,
) -> tuple[VolumeView, Operation]:
    """Insert a volume, charge its size, and accept its making. `box` seals the key of an encrypted one."""
    pool = pools.choose(session, spec.pool, for_files=False)
    is_block = pool.kind in describe.BLOCK_KINDS
    _check_unit(session, spec, pool, is_block=is_block)
    image = ready_disk(session, spec.image, project=project) if spec.image else None
    volume_format = spec.format or (DiskFormat.RAW if is_block else DiskFormat.QCOW2).value
    if image is not None and volume_format != DiskFormat.QCOW2.value:
        raise InvalidRequest("format-wrong", "format: a volume made from an image is a linked clone, so qcow2", field="format")
    if spec.is_encrypted and volume_format != DiskFormat.QCOW2.value:
        raise InvalidRequest("format-wrong", "format: an encrypted volume is qcow2; leave format out", field="format")
    size_bytes = size_of(spec.size_bytes, image, field="size_bytes")
    quota.charge(session, project.id, quota.Charge(disk_bytes=size_bytes))
    volume = volumes.insert(
        session,
        volume_id=mint("vol"),
        now=now,
        project_id=project.id,
        name=spec.name,
        pool_id=pool.id,
        format=volume_format,
        size_bytes=size_bytes,
        base_image_id=image.id if image else None,
        is_deleted_with_vm=False,
        is_encrypted=spec.is_encrypted,
        unit=spec.unit,
    )
    if spec.is_encrypted:
        volume_keys.add(session, volume.id, box, now=now)
    operation = accept(
        session,
        "volume.create",
        subject_id=volume.id,
        subject_name=volume.name,
        project_id=project.id,
        params={"volume_id": volume.id, "to_host_id": ""},
        actor=actor,
        now=now,
    )
    return views(session, (volume,))[0], operation


def _check_unit(session: Session, spec: VolumeSpec, pool: Pool, *, is_block: bool) -> None:
    """Refuse what a pool without files cannot hold, and a LUN that is none, or another volume's."""
    if is_block and (spec.image or spec.is_encrypted or spec.format not in {"", DiskFormat.RAW}):
        field = "image" if spec.image else "is_encrypted" if spec.is_encrypted else "format"
        raise InvalidRequest(
            "pool-without-files",
            f"{field}: a volume of pool {pool.name} ({pool.kind.value}) is raw and empty; leave it out",
            field=field,
        )
    if pool.kind is PoolKind.ISCSI and not spec.unit:
        raise InvalidRequest("lun-missing", f"lun: pool {pool.name} makes no LUNs; name one, for example `--lun 1`", field="lun")
    if pool.kind is not PoolKind.ISCSI and spec.unit:
        raise InvalidRequest(
            "lun-not-taken", f"lun: pool {pool.name} is of kind {pool.kind.value}; only iSCSI has LUNs", field="lun"
        )
    taken = volumes.of_unit(session, pool.id, spec.unit) if spec.unit else None
    if taken is not None:
        raise AlreadyExists("lun-taken", f"lun: LUN {spec.unit} of pool {pool.name} is volume {taken.name} already", field="lun")


def delete(
    session: Session, name_or_id: str, *, project: Project, expected_version: int | None, actor: Actor, now: datetime
) -> Operation:
    """Accept the removal of a volume that no vm has; it is hidden for 24 h first. Conflict names the vm."""
    volume = find(session, name_or_id, project=project)
    if volume.vm_id is not None:
        name = lookup.names(session, schema.vm, [volume.vm_id]).get(volume.vm_id, volume.vm_id)
        raise Conflict("volume-attached", f"volume {volume.name} belongs to vm {name}; delete the vm first", vm=name)
    layered.refuse(session, volume, verb="deleted")
    volumes.check_version(session, volume.id, expected_version)
    return accept(
        session,
        "volume.delete",
        subject_id=volume.id,
        subject_name=volume.name,
        project_id=project.id,
        params={"volume_id": volume.id},
        actor=actor,
        now=now,
    )


def undelete(
    session: Session, name_or_id: str, *, project: Project, expected_version: int | None, actor: Actor, now: datetime
) -> Operation:
    """Accept the return of a deleted volume. Conflict past its grace, AlreadyExists where its name was given away."""
    volume = _find_deleted(session, name_or_id, project=project)
    if volume.purge_after is None or volume.purge_after <= now:
        raise Conflict("volume-purged", f"volume {volume.name} is past its 24 h; its bytes are gone")
    if volumes.find(session, project.id, volume.name) is not None:
        raise AlreadyExists(
            "volume-exists", f"another volume is called {volume.name} now; delete that one first", name=volume.name
        )
    return _accept_deleted(session, "volume.undelete", volume, expected_version=expected_version, actor=actor, now=now)


def purge(
    session: Session, name_or_id: str, *, project: Project, expected_version: int | None, actor: Actor, now: datetime
) -> Operation:
    """Accept the end of a deleted volume's grace: its bytes and quota go now. Conflict where it is not deleted."""
    volume = _find_deleted(session, name_or_id, project=project)
    return _accept_deleted(session, "volume.purge", volume, expected_version=expected_version, actor=actor, now=now)


def _find_deleted(session: Session, name_or_id: str, *, project: Project) -> Volume:
    volume = volumes.find_deleted(session, project.id, name_or_id)
    if volume is None:
        found = find(session, name_or_id, project=project)
        raise Conflict(
            "volume-not-deleted", f"volume {found.name} is not deleted; `trimtab volume delete {found.name}` does that"
        )
    return volume


def _accept_deleted(
    session: Session, kind: str, volume: Volume, *, expected_version: int | None, actor: Actor, now: datetime
) -> Operation:
    if expected_version is not None and volume.version != expected_version:
        raise Conflict("stale-etag", f"volume {volume.name} changed since you read it; read it again, then decide")
    return accept(
        session,
        kind,
        subject_id=volume.id,
        subject_name=volume.name,
        project_id=volume.project_id,
        params={"volume_id": volume.id},
        actor=actor,
        now=now,
    )


def resize(
    session: Session,
    name_or_id: str,
    size_bytes: int,
    *,
    project: Project,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> Operation:
    """Accept a greater size: the quota is charged and the space claimed at once. InvalidRequest for a smaller one."""
    volume = find(session, name_or_id, project=project)
    if volume.unit:
        raise Conflict(
            "lun-fixed",
            f"volume {volume.name} is LUN {volume.unit} of an iSCSI target, which grows on its server only",
            volume=volume.name,
        )
    if size_bytes < volume.size_bytes:
        raise InvalidRequest(
            "volume-shrink",
            f"size_bytes: volume {volume.name} has {volume.size_bytes}; it can grow, not shrink to {size_bytes}: make a smaller "
            f"volume and copy what is to stay",
            field="size_bytes",
            bound=volume.size_bytes,
        )
    if volume.observed_state != "present":
        raise Conflict("volume-not-ready", f"volume {volume.name} is {volume.observed_state}, not present yet")
    layered.refuse(session, volume, verb="resized")
    pool = describe.get_pool(session, volume.pool_id)
    volumes.check_version(session, volume.id, expected_version)
    quota.charge(session, project.id, quota.Charge(disk_bytes=size_bytes - volume.size_bytes))
    if not volume_claims.grow(session, volume, pool, size_bytes):
        raise NoCapacity(
            "pool-full",
            f"pool {pool.name} has no room for {size_bytes - volume.size_bytes} bytes more of volume {volume.name} beside its "
            f"reserve; see `trimtab pool get {pool.name}`",
        )
    return accept(
        session,
        "volume.resize",
        subject_id=volume.vm_id or volume.id,
        subject_name=volume.name,
        project_id=project.id,
        params={
            "volume_id": volume.id,
            "size_bytes": size_bytes,
            "before_bytes": volume.size_bytes,
            "vm_id": volume.vm_id or "",
        },
        actor=actor,
        now=now,
    )


def limit(
    session: Session,
    name_or_id: str,
    *,
    iops: int | None,
    bandwidth_mib_s: int | None,
    project: Project,
    expected_version: int | None,
    actor: Actor,
    now: datetime,
) -> Operation:
    """Accept other limits (0: none; None: as it is)."""
    volume = find(session, name_or_id, project=project)
    if iops is None and bandwidth_mib_s is None:
        raise InvalidRequest("limit-empty", "iops: give iops, bandwidth_mib_s or both; 0 takes a limit away", field="iops")
    wanted_iops = volume.iops_limit if iops is None else iops
    wanted_mib_s = volume.bandwidth_limit_mib_s if bandwidth_mib_s is None else bandwidth_mib_s
    volumes.check_version(session, volume.id, expected_version)
    volumes.set_limits(session, volume.id, iops=wanted_iops, bandwidth_mib_s=wanted_mib_s)
    return accept(
        session,
        "volume.limit",
        subject_id=volume.vm_id or volume.id,
        subject_name=volume.name,
        project_id=project.id,
        params={
            "volume_id": volume.id,
            "vm_id": volume.vm_id or "",
            "iops": wanted_iops,
            "bandwidth_mib_s": wanted_mib_s,
            "before_iops": volume.iops_limit,
            "before_bandwidth_mib_s": volume.bandwidth_limit_mib_s,
        },
        actor=actor,
        now=now,
    )


def find(session: Session, name_or_id: str, *, project: Project) -> Volume:
    volume = volumes.find(session, project.id, name_or_id)
    if volume is None:
        raise NotFound("volume-not-found", f"there is no volume {name_or_id} in project {project.name}", volume=name_or_id)
    return volume


def get(session: Session, name_or_id: str, *, project: Project) -> VolumeView:
    return views(session, (find(session, name_or_id, project=project),))[0]


def page(session: Session, page: keyset.Page, *, project: Project) -> tuple[tuple[VolumeView, ...], tuple[str, str] | None]:
    found, next_after = volumes.page(session, page, project_id=project.id)
    return views(session, found), next_after


def views(session: Session, found: tuple[Volume, ...]) -> tuple[VolumeView, ...]:
    names = lookup.names_in(
        session,
        {
            schema.project: {one.project_id for one in found},
            schema.pool: {one.pool_id for one in found} | {one.other_pool_id for one in found},
            schema.host: {one.host_id for one in found},
            schema.image: {one.base_image_id for one in found},
            schema.vm: {one.vm_id for one in found},
        },
    )
    return tuple(
        VolumeView(
            volume=one,
            project_name=names.get(one.project_id, ""),
            pool_name=names.get(one.pool_id, ""),
            host_name=names.get(one.host_id, ""),
            image_name=names.get(one.base_image_id or "", ""),
            vm_name=names.get(one.vm_id or "", ""),
            other_pool_name=names.get(one.other_pool_id or "", ""),
        )
        for one in found
    )


def refuse_files_beside(session: Session, volume: Volume) -> None:
    """Refuse a volume to boot from that is no file where a seed or UEFI variables are to lie beside it."""
    pool = describe.get_pool(session, volume.pool_id)
    if pool.kind in describe.BLOCK_KINDS:
        raise InvalidRequest(
            "pool-without-files",
            f"volume: pool {pool.name} of kind {pool.kind.value} holds no files, so no cloud-init seed and no UEFI variables; leave them "
            f"out, or boot from a pool of files and attach {volume.name}",
            field="volume",
        )


def ready_disk(session: Session, name_or_id: str, *, project: Project) -> Image:
    """Return the disk image. NotFound, or Conflict while it is not imported; InvalidRequest for an ISO."""
    image = images.find(session, name_or_id, project=project)
    if image.kind != "disk":
        raise InvalidRequest("image-not-a-disk", f"image: {image.name} is an ISO; a volume needs a disk image", field="image")
    if image.state != "ready":
        raise Conflict(
            "image-not-ready", f"image {image.name} is {image.state}; see `trimtab image get {image.name}`", state=image.state
        )
    return image


def size_of(asked_bytes: int | None, image: Image | None, *, field: str) -> int:
    """Return the volume's size: as asked, else the image's. InvalidRequest below the image's or off a sector."""
    smallest = image.virtual_size_bytes if image else 0
    if asked_bytes is None:
        if image is None:
            raise InvalidRequest("size-missing", f"{field}: give a size or an image; for example 10737418240", field=field)
        return smallest
    if asked_bytes < smallest:
        raise InvalidRequest(
            "size-too-small",
            f"{field}: image {image.name if image else ''} needs at least {smallest}, not {asked_bytes}",
            field=field,
        )
    if asked_bytes % SECTOR_BYTES:
        raise InvalidRequest("size-off-sector", f"{field}: a multiple of {SECTOR_BYTES}, not {asked_bytes}", field=field)
    return asked_bytes
