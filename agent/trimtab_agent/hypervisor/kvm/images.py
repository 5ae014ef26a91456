"""Images of a directory pool: imported under suspicion, stored as a qcow2 of our own making (or an ISO), never changed after.

    nothing ─transfer, hash, bound→ source ─own header check→ acceptable ─qemu-img convert→ stored ─check again→ published

All work happens in a hidden directory that belongs to nobody's user and to one import (its lock says so); what an import that was
cut left behind is removed by the next one. Whatever is written there leaves to the pool's disks what `free_space` says. Copies from a
peer were made by this same path there: they are compared with the hash that the controller recorded, checked, and kept byte for byte.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

from trimtab_agent.hypervisor.base import JobControl, SourceReader
from trimtab_agent.hypervisor.kvm import os_errors, qemu_img, volumes
from trimtab_agent.hypervisor.kvm.free_space import FreeSpace, free_bytes
from trimtab_agent.hypervisor.kvm.image_header import ImageFacts, check_image
from trimtab_agent.hypervisor.kvm.pool_layout import IMAGES, PoolLayout, image_name, regular_file, sync_directory
from trimtab_protos.errors import AlreadyExists, Conflict, Internal, InvalidRequest, NoCapacity, NotFound
from trimtab_protos.messages import (
    DiskFormat,
    ImageResult,
    ImageSource,
    ImageSpec,
    JobProgress,
    PeerSource,
    PoolSpec,
    UploadSource,
    VolumeSource,
)

_SOURCE, _STORED = "source", "stored"
_SAID_OF_DAMAGE = ("image is corrupt", "error while reading")
"""What QEMU's refusals sound like where tables or clusters lead nowhere."""
_BLOCK_BYTES = 1 << 20
_CONVERT_FLOOR_BYTES_S = 4 << 20
_CONVERT_BASE_S = 60
_LOOK_EVERY_BYTES = 4 << 20
_QCOW2_OVERHEAD_BYTES = 64 << 20
"""Metadata of a qcow2 is under 0.02 % of its size at 64 KiB clusters; generous, since the limit only stops runaways."""


def import_image(
    image: ImageSpec,
    pool: PoolSpec,
    layout: PoolLayout,
    source: ImageSource,
    *,
    reader: SourceReader,
    control: JobControl,
) -> ImageResult:
    """Bring the image into the pool. See `Hypervisor.import_image`."""
    name = image_name(image.image_id, _stored_format(image.format))
    try:
        with layout.open(IMAGES) as directory:
            known = _known_result(image, directory, name)
            if known is not None:
                return known
            with _work_directory(directory, image.image_id) as work:
                space = FreeSpace.of(work)
                if isinstance(source, VolumeSource):
                    facts = _flatten(source, layout, work, space=space, control=control)
                    return _publish(image, directory, work, name, facts=facts, source_sha256="", control=control)
                source_sha256 = _transfer(image, pool, source, work, reader=reader, space=space, control=control)
                facts = _check(work, _SOURCE, image.format, max_bytes=image.max_bytes)
                if isinstance(source, PeerSource) or image.format is DiskFormat.ISO:
                    os.rename(_SOURCE, _STORED, src_dir_fd=work, dst_dir_fd=work)
                else:
                    _convert(facts, work, space=space, control=control)
                return _publish(image, directory, work, name, facts=facts, source_sha256=source_sha256, control=control)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"import image {image.image_id}") from error


def path_of(image_id: str, layout: PoolLayout) -> str:
    """Return the path of the replica. NotFound where there is none."""
    try:
        with layout.open(IMAGES) as directory:
            for format in DiskFormat:
                if regular_file(directory, image_name(image_id, format)):
                    return layout.image(image_id, format)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"open image {image_id}") from error
    raise NotFound("image-not-found", f"image {image_id} is not in pool {layout.pool_id} on this host", image_id=image_id)


def delete(image_id: str, layout: PoolLayout) -> None:
    """Remove the replica. Conflict: volumes of this pool are linked clones of it."""
    try:
        clones = volumes.clones_of(image_id, layout)
        if clones:
            raise Conflict(
                "image-in-use",
                f"{len(clones)} volumes of the pool are linked clones of the image, first {clones[0]}",
                volume_id=clones[0],
            )
        with layout.open(IMAGES) as directory:
            for name in (*(image_name(image_id, format) for format in DiskFormat), _record_name(image_id)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
            _remove_leftovers(directory, image_id)
            sync_directory(directory)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"remove image {image_id}") from error


def _stored_format(declared: DiskFormat) -> DiskFormat:
    return DiskFormat.ISO if declared is DiskFormat.ISO else DiskFormat.QCOW2


def _record_name(image_id: str) -> str:
    return f"{image_name(image_id, DiskFormat.RAW).removesuffix('.raw')}.json"


def _known_result(image: ImageSpec, directory: int, name: str) -> ImageResult | None:
    """Return what the import that made the present replica proved; None where there is no whole replica."""
    if regular_file(directory, name) is None:
        return None
    with _reading(directory, _record_name(image.image_id)) as descriptor, os.fdopen(descriptor, closefd=False) as file:
        recorded = json.load(file)
    result = ImageResult(**{**recorded, "format": DiskFormat(recorded["format"])})
    if image.source_sha256 and image.source_sha256 not in (result.source_sha256, result.stored_sha256):
        raise Conflict("image-differs", f"image {image.image_id} is here with another content", sha256=result.source_sha256)
    return result


# --- the work directory ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _work_directory(directory: int, image_id: str) -> Iterator[int]:
    """Lend a fresh hidden directory, locked; removed with all that is in it afterwards."""
    _remove_leftovers(directory, image_id)
    name = f".{image_id}.{secrets.token_hex(6)}"
    os.mkdir(name, 0o700, dir_fd=directory)
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        with contextlib.suppress(OSError):  # a filesystem without locks: leftovers stay until the image is deleted
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        _empty(descriptor)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=directory)


def _remove_leftovers(directory: int, image_id: str) -> None:
    for name in os.listdir(directory):
        if not name.startswith(f".{image_id}."):
            continue
        with contextlib.suppress(OSError):  # BlockingIOError: an import that lives
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _empty(descriptor)
            finally:
                os.close(descriptor)
            os.rmdir(name, dir_fd=directory)


def _empty(directory: int) -> None:
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)


# --- steps -----------------------------------------------------------------------------------------------------------------


def _transfer(
    image: ImageSpec,
    pool: PoolSpec,
    source: ImageSource,
    work: int,
    *,
    reader: SourceReader,
    space: FreeSpace,
    control: JobControl,
) -> str:
    """Write the source into the work directory and return its hash; bounded, and compared with what was declared."""
    total_bytes, bound = 0, image.max_bytes

    def announce(size_bytes: int) -> None:
        nonlocal total_bytes
        if bound and size_bytes > bound:
            raise _too_large(bound)
        _require_room(space, size_bytes)
        total_bytes = size_bytes

    announce(_announced_bytes(source))
    digest, done_bytes, granted_bytes = hashlib.sha256(), 0, 0
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(_SOURCE, flags, 0o600, dir_fd=work), "wb") as file:
        for block in reader.read_blocks(source, pool, control, on_size=announce):
            _stop_if_cancelled(control)
            done_bytes += len(block)
            if bound and done_bytes > bound:
                raise _too_large(bound)
            if done_bytes > granted_bytes:
                # What was announced is a claim of the source's, and guests' disks grow meanwhile.
                written_bytes = done_bytes - len(block)
                left_bytes = _require_room(space, len(block), written_bytes=written_bytes)
                granted_bytes = written_bytes + min(left_bytes, max(len(block), _LOOK_EVERY_BYTES))
            digest.update(block)
            file.write(block)
            control.report(JobProgress(done_bytes=done_bytes, total_bytes=total_bytes, phase="transfer"))
    _stop_if_cancelled(control)
    found = digest.hexdigest()
    wanted = source.stored_sha256 if isinstance(source, PeerSource) else image.source_sha256
    if wanted and found != wanted:
        raise InvalidRequest(
            "image-checksum-mismatch",
            f"the content's SHA-256 is {found}, declared was {wanted}",
            sha256=found,
            declared=wanted,
        )
    return found


def _announced_bytes(source: ImageSource) -> int:
    if isinstance(source, UploadSource):
        return source.size_bytes
    return source.file_size_bytes if isinstance(source, PeerSource) else 0


def _too_large(bound: int) -> InvalidRequest:
    return InvalidRequest("image-too-large", f"the image is larger than the {bound} bytes allowed", field="max_bytes")


def _require_room(space: FreeSpace, needed_bytes: int, *, written_bytes: int = 0) -> int:
    """Return how much may be written, at least what is needed."""
    left_bytes = space.left_bytes(written_bytes=written_bytes)
    if needed_bytes > left_bytes:
        raise _full(space, f"the import needs {needed_bytes} bytes more and may take {left_bytes}")
    return left_bytes


def _full(space: FreeSpace, why: str) -> NoCapacity:
    return NoCapacity(
        "pool-full",
        f"the pool has no room for the image: {why}, since {space.kept_free_bytes} are kept for the disks in it. Make room there, or "
        "take a pool with more: `trimtab image import NAME FILE|URL --pool POOL`, see `trimtab pool list`",
    )


def _check(work: int, name: str, declared: DiskFormat, *, max_bytes: int) -> ImageFacts:
    with _reading(work, name) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
        return check_image(file, declared, max_bytes=max_bytes)


def _convert(facts: ImageFacts, work: int, *, space: FreeSpace, control: JobControl) -> None:
    """Rewrite the checked source as a qcow2 of our own making, as nobody, in the sandbox."""
    if os.geteuid() == 0:
        os.fchown(work, qemu_img.NOBODY, qemu_img.NOBODY)
        os.chown(_SOURCE, qemu_img.NOBODY, qemu_img.NOBODY, dir_fd=work, follow_symlinks=False)
    size_bytes = facts.virtual_size_bytes
    limits = qemu_img.Limits(
        timeout_s=_CONVERT_BASE_S + size_bytes / _CONVERT_FLOOR_BYTES_S,
        cpu_s=_CONVERT_BASE_S + size_bytes // (16 << 20),
        file_bytes=size_bytes + size_bytes // 64 + _QCOW2_OVERHEAD_BYTES,
    )

    def report() -> None:
        written = 0
        with contextlib.suppress(FileNotFoundError):  # not begun yet
            written = os.stat(_STORED, dir_fd=work, follow_symlinks=False).st_blocks * 512
        control.report(JobProgress(done_bytes=min(written, size_bytes), total_bytes=size_bytes, phase="convert"))

    source = f"driver={facts.format.value},file.driver=file,file.filename={_SOURCE}"
    if facts.format is DiskFormat.QCOW2:
        # Said twice: our parser found no backing file, and QEMU is told that there is none.
        source = "json:" + json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": _SOURCE}, "backing": None})
        arguments = ["convert", "-q", "-O", "qcow2", source, _STORED]
    else:
        arguments = ["convert", "-q", "--image-opts", "-O", "qcow2", source, _STORED]
    try:
        _write(arguments, work, space=space, limits=limits, control=control, as_nobody=True, on_tick=report)
    except Internal as failure:
        if facts.format is DiskFormat.QCOW2 and _says_damaged(failure) and _is_readable(work):
            raise _damaged(failure) from failure
        raise
    if os.geteuid() == 0:
        os.fchown(work, 0, 0)
    converted = _check(work, _STORED, DiskFormat.QCOW2, max_bytes=0)
    if converted.virtual_size_bytes != size_bytes:
        raise Internal("image-convert-wrong", f"converted to {converted.virtual_size_bytes} bytes instead of {size_bytes}")


def _write(
    arguments: Sequence[str],
    work: int,
    *,
    space: FreeSpace,
    limits: qemu_img.Limits,
    control: JobControl,
    as_nobody: bool,
    on_tick: Callable[[], None],
) -> None:
    """Run what writes the stored file; the kernel ends it where it would take what is kept free, a look where others take it."""
    room_bytes = space.left_bytes(written_bytes=_size_bytes(work, _SOURCE))

    def look() -> None:
        on_tick()
        if free_bytes(work) < space.kept_free_bytes:
            raise _full(space, "others have taken what was left")

    within = replace(limits, file_bytes=min(limits.file_bytes, room_bytes))
    try:
        qemu_img.run(arguments, directory=work, limits=within, cancelled=control.cancelled, as_nobody=as_nobody, on_tick=look)
    except InvalidRequest as error:
        if error.context.get("limit") == qemu_img.FILE_BYTES and room_bytes < limits.file_bytes:
            raise _full(space, f"what it becomes is larger than the {room_bytes} bytes that it may take") from error
        raise


def _size_bytes(work: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=work, follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def _says_damaged(failure: Internal) -> bool:
    lowered = failure.message.lower()
    return any(said in lowered for said in _SAID_OF_DAMAGE)


def _is_readable(work: int) -> bool:
    """Tell whether this host reads every byte of the source: then what QEMU could not read in it is the image's own fault."""
    try:
        with _reading(work, _SOURCE) as descriptor:
            while os.read(descriptor, 1 << 20):
                pass
    except OSError:
        return False
    return True


def _damaged(failure: Internal) -> InvalidRequest:
    return InvalidRequest(
        "image-damaged",
        f"the image is damaged behind its header ({failure.message}); look with `qemu-img check FILE`, and import a whole copy: "
        "`trimtab image import NAME FILE --sha256 SUM`",
    )


def _flatten(source: VolumeSource, layout: PoolLayout, work: int, *, space: FreeSpace, control: JobControl) -> ImageFacts:
    """Write what a layer of ours holds, seen through all below it, into one file; return what our own parser makes of that."""
    path = layout.volume(source.volume_id, DiskFormat.QCOW2, source.layer_id)
    seen = volumes.observe(source.volume_id, layout)
    if not seen.is_present or not os.path.exists(path):
        raise NotFound("layer-not-found", f"layer {source.layer_id or 'bottom'} of volume {source.volume_id} is not here")
    limits = qemu_img.Limits(
        timeout_s=_CONVERT_BASE_S + seen.size_bytes / _CONVERT_FLOOR_BYTES_S,
        cpu_s=_CONVERT_BASE_S + seen.size_bytes // (8 << 20),
        file_bytes=2 * seen.size_bytes + _QCOW2_OVERHEAD_BYTES,
    )

    def report() -> None:
        written = 0
        with contextlib.suppress(FileNotFoundError):  # not begun yet
            written = os.stat(_STORED, dir_fd=work, follow_symlinks=False).st_blocks * 512
        control.report(JobProgress(done_bytes=min(written, seen.size_bytes), total_bytes=seen.size_bytes, phase="convert"))

    # As root: the chain's files are nobody's to read. Their headers are ours; a guest cannot reach them.
    arguments = ["convert", "-q", "-f", "qcow2", "-O", "qcow2", path, _STORED]
    _write(arguments, work, space=space, limits=limits, control=control, as_nobody=False, on_tick=report)
    return _check(work, _STORED, DiskFormat.QCOW2, max_bytes=0)


def _publish(
    image: ImageSpec,
    directory: int,
    work: int,
    name: str,
    *,
    facts: ImageFacts,
    source_sha256: str,
    control: JobControl,
) -> ImageResult:
    """Hash, sync and name the stored file; its record is written first, so that a replica is never without one."""
    with _reading(work, _STORED) as descriptor:
        if os.geteuid() == 0:
            os.fchown(descriptor, 0, 0)
        # Immutable, and readable for QEMU's own user whatever it is.
        os.fchmod(descriptor, 0o444)
        os.fsync(descriptor)
        file_size_bytes = os.fstat(descriptor).st_size
        stored_sha256 = _hash(descriptor, file_size_bytes, control)
    result = ImageResult(
        image_id=image.image_id,
        format=_stored_format(image.format),
        virtual_size_bytes=facts.virtual_size_bytes,
        file_size_bytes=file_size_bytes,
        source_sha256=image.source_sha256 or source_sha256,
        stored_sha256=stored_sha256,
    )
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open("record", flags, 0o644, dir_fd=work), "w") as file:
        json.dump(asdict(result), file)
        file.flush()
        os.fsync(file.fileno())
    os.rename("record", _record_name(image.image_id), src_dir_fd=work, dst_dir_fd=directory)
    with contextlib.suppress(FileExistsError):
        os.link(_STORED, name, src_dir_fd=work, dst_dir_fd=directory, follow_symlinks=False)
        sync_directory(directory)
        return result
    raise AlreadyExists("image-exists", f"image {image.image_id} was made by somebody else meanwhile")


def _hash(descriptor: int, size_bytes: int, control: JobControl) -> str:
    digest, done_bytes = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK_BYTES, done_bytes):
        _stop_if_cancelled(control)
        digest.update(block)
        done_bytes += len(block)
        control.report(JobProgress(done_bytes=done_bytes, total_bytes=size_bytes, phase="verify"))
    return digest.hexdigest()


def _stop_if_cancelled(control: JobControl) -> None:
    if control.cancelled.is_set():
        raise Conflict("job-cancelled", "the import was cancelled")


@contextlib.contextmanager
def _reading(directory: int, name: str) -> Iterator[int]:
    # Not blocking: the sandboxed tool might have put a pipe there.
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidRequest("image-refused", f"{name} is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)
