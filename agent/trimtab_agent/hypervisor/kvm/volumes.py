"""Volumes of a directory pool: writable disks, sparse, independent or linked clones of an image in the same pool.

A volume appears under its name only when it is whole (made under a hidden name, synced, linked), so a cut leaves either nothing or
all. Its format is what its name says and is never probed: a guest can write any header into its own raw disk (CVE-2014-0134).
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from trimtab_agent.hypervisor.kvm import os_errors, qemu_img
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.image_header import qcow2_backing_file, qcow2_virtual_size
from trimtab_agent.hypervisor.kvm.pool_layout import (
    IMAGES,
    VOLUME_FORMATS,
    VOLUMES,
    PoolLayout,
    image_name,
    regular_file,
    sync_directory,
    volume_name,
)
from trimtab_protos.errors import AlreadyExists, Conflict, InvalidRequest, NotFound, Unavailable
from trimtab_protos.messages import DiskFormat, VolumeObservation, VolumeSpec

_MAX_VOLUME_BYTES = 64 << 40
_SECTOR = 512
_CRYPT_METHOD_OFFSET, _LUKS = 32, 2
_UNTIMED_TRIES = 16
# The key is as long as AES-256's and drawn by lot: to stretch it would cost seconds at each start and gain nothing.
ENCRYPTION = f"encrypt.format=luks,encrypt.key-secret={qemu_img.KEY_ID},encrypt.iter-time=10"
_ABANDONED_AFTER_S = 3600.0
_COPY_FLOOR_BYTES_S = 4 << 20
"""A pool slower than this is broken; bounds how long a copy may take."""


@dataclass(frozen=True, slots=True)
class CopyWatch:
    """How a copy that takes long reports (bytes written so far) and learns that it shall end."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    on_bytes: Callable[[int], None] = lambda _written: None


def ensure(
    volume: VolumeSpec, layout: PoolLayout, *, watch: CopyWatch | None = None, key: bytes | None = None
) -> VolumeObservation:
    """Make the volume, or a layer of it, exist. See `Hypervisor.ensure_volume`. `watch` follows a copy that takes long; `key` is that of
    an encrypted one.
    """
    name = volume_name(volume.volume_id, volume.format, volume.layer_id)
    _check_size(volume)
    _check_encryption(volume, key)
    try:
        with layout.open(VOLUMES) as directory:
            for format in VOLUME_FORMATS:
                if format is not volume.format and regular_file(directory, volume_name(volume.volume_id, format)):
                    raise Conflict(
                        "volume-differs", f"volume {volume.volume_id} exists as {format.value}", exists_as=format.value
                    )
            if regular_file(directory, name) is None:
                with contextlib.suppress(AlreadyExists):  # made meanwhile; compared like any other below
                    _create_timed(volume, layout, directory, name, watch or CopyWatch(), key)
            _compare(volume, layout, directory, name)
            return _observe(volume.volume_id, directory, name)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"make volume {volume.volume_id}") from error


def observe(volume_id: str, layout: PoolLayout) -> VolumeObservation:
    """Return what is there of the volume."""
    try:
        with layout.open(VOLUMES) as directory:
            for format in VOLUME_FORMATS:
                name = volume_name(volume_id, format)
                if regular_file(directory, name):
                    seen = _observe(volume_id, directory, name)
                    return replace(seen, allocated_bytes=_allocated_bytes(directory, _names_of(directory, volume_id)))
    except OSError as error:
        raise os_errors.from_os(error, doing=f"look at volume {volume_id}") from error
    return VolumeObservation(volume_id=volume_id, is_present=False)


def grow(volume: VolumeSpec, layout: PoolLayout, *, key: bytes | None = None) -> VolumeObservation:
    """Grow a volume that no guest of this host has open. InvalidRequest (`volume-shrink`), NotFound, Conflict (`image-locked`)."""
    _check_encryption(volume, key)
    name = volume_name(volume.volume_id, volume.format)
    try:
        with layout.open(VOLUMES) as directory:
            size_bytes = require_growth(volume, _observe_named(volume, directory, name))
            if size_bytes != volume.size_bytes:
                # A raw volume's file is as long as the volume, sparse or not.
                limits = qemu_img.Limits(file_bytes=2 * volume.size_bytes + (1 << 40))
                qemu_img.run(_resize_arguments(volume, name, volume.size_bytes), directory=directory, limits=limits, key=key)
            return _observe(volume.volume_id, directory, name)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"grow volume {volume.volume_id}") from error


def require_growth(volume: VolumeSpec, seen: VolumeObservation) -> int:
    """Return the size it has. NotFound where it is not there, InvalidRequest where the spec's size is smaller."""
    if not seen.is_present:
        raise NotFound("volume-not-found", f"volume {volume.volume_id} is not in pool {volume.pool_id} on this host")
    _check_size(volume)
    if volume.size_bytes < seen.size_bytes:
        raise InvalidRequest(
            "volume-shrink",
            f"volume {volume.volume_id} has {seen.size_bytes} bytes; it can grow, not shrink to {volume.size_bytes}",
            field="size_bytes",
        )
    return seen.size_bytes


def _observe_named(volume: VolumeSpec, directory: int, name: str) -> VolumeObservation:
    if regular_file(directory, name) is None:
        return VolumeObservation(volume_id=volume.volume_id, is_present=False)
    return _observe(volume.volume_id, directory, name)


def delete(volume_id: str, layout: PoolLayout) -> None:
    """Remove the volume's files, every layer; the caller has made sure that no domain uses them."""
    try:
        with layout.open(VOLUMES) as directory:
            for name in _names_of(directory, volume_id):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
            sync_directory(directory)
    except OSError as error:
        raise os_errors.from_os(error, doing=f"remove volume {volume_id}") from error


def names_of(volume_id: str, layout: PoolLayout) -> tuple[str, ...]:
    """Return every path that the volume may have, whatever its format, and those of its layers."""
    bottoms = [layout.volume(volume_id, format) for format in VOLUME_FORMATS]
    with layout.open(VOLUMES) as directory:
        found = [str(layout.path / VOLUMES / name) for name in _names_of(directory, volume_id)]
    return tuple(dict.fromkeys([*bottoms, *found]))


def _allocated_bytes(directory: int, names: Sequence[str]) -> int:
    total = 0
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(name, dir_fd=directory, follow_symlinks=False).st_blocks * _SECTOR
    return total


def _names_of(directory: int, volume_id: str) -> list[str]:
    """Return the names of the volume's files, its layers over the bottom one first."""
    start = f"{check_id(volume_id, 'volume_id')}."
    names = [name for name in _whole_names(directory) if name.startswith(start)]
    return sorted(names, key=lambda name: name.count("."), reverse=True)


def growth(layout: PoolLayout) -> tuple[int, int]:
    """Return (how much the pool's volumes may still grow, what they have allocated of their sizes)."""
    promised = written = 0
    with layout.open(VOLUMES) as directory:
        frozen = frozen_names(directory)
        for name in _whole_names(directory):
            # A layer that another lies over does not grow any more.
            if name in frozen:
                continue
            with contextlib.suppress(FileNotFoundError, InvalidRequest):
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                size_bytes, allocated_bytes = _virtual_size(directory, name), found.st_blocks * _SECTOR
                promised += max(0, size_bytes - allocated_bytes)
                written += min(size_bytes, allocated_bytes)
    return promised, written


def refuse_if_below(volume_id: str, layout: PoolLayout) -> None:
    """Raise Conflict where another volume of this pool is a linked clone of this one."""
    with layout.open(VOLUMES) as directory:
        own = frozenset(_names_of(directory, volume_id))
        for name in _whole_names(directory):
            with contextlib.suppress(FileNotFoundError, InvalidRequest):
                if name not in own and os.path.basename(backing_file(directory, name)) in own:
                    clone = name.partition(".")[0]
                    raise Conflict("volume-in-use", f"volume {clone} is a linked clone of volume {volume_id}", volume_id=clone)


def frozen_names(directory: int) -> frozenset[str]:
    """Return the names of the files that others lie over."""
    found = set()
    for name in _whole_names(directory):
        with contextlib.suppress(FileNotFoundError, InvalidRequest):
            found.add(os.path.basename(backing_file(directory, name)))
    return frozenset(found)


def clones_of(image_id: str, layout: PoolLayout) -> tuple[str, ...]:
    """Return the ids of this pool's volumes that are linked clones of the image."""
    images = {layout.image(image_id, format) for format in DiskFormat}
    clones = []
    with layout.open(VOLUMES) as directory:
        for name in _whole_names(directory):
            with contextlib.suppress(FileNotFoundError, InvalidRequest):
                if backing_file(directory, name) in images:
                    clones.append(name.partition(".")[0])
    return tuple(clones)


def _whole_names(directory: int) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                yield entry.name


def _create_timed(volume: VolumeSpec, layout: PoolLayout, directory: int, name: str, watch: CopyWatch, key: bytes | None) -> None:
    """Create it, and begin anew where `qemu-img` gave up before it wrote anything: 2 of 6 runs on one kernel did."""
    for tries_left in reversed(range(_UNTIMED_TRIES)):
        try:
            _create(volume, layout, directory, name, watch, key)
        except Unavailable as error:
            if error.code != qemu_img.UNTIMED or not tries_left:
                raise
        else:
            return


def _create(volume: VolumeSpec, layout: PoolLayout, directory: int, name: str, watch: "CopyWatch", key: bytes | None) -> None:
    with unfinished(directory, volume.volume_id) as temporary:
        if volume.copy_image_id:
            _copy_image(volume, layout, directory, temporary, watch, key)
        elif volume.copy_volume_id:
            _copy_layer(volume, layout, directory, temporary, watch)
        elif key is not None:
            _qemu_img(["create", "-q", "-f", "qcow2", "-o", ENCRYPTION, temporary, str(volume.size_bytes)], directory, key=key)
        elif volume.base_volume_id:
            _lay_over(volume, layout, directory, temporary)
        elif volume.base_image_id:
            _clone_image(volume, layout, directory, temporary)
        elif volume.format is DiskFormat.RAW:
            os.truncate(f"/proc/self/fd/{directory}/{temporary}", volume.size_bytes)
        else:
            _qemu_img(["create", "-q", "-f", "qcow2", temporary, str(volume.size_bytes)], directory)
        publish(directory, temporary, name)


@contextlib.contextmanager
def unfinished(directory: int, volume_id: str) -> Iterator[str]:
    """Lend the hidden name of an empty file for the block to fill and publish; the name is gone afterwards."""
    _remove_leftovers(directory, volume_id)
    temporary = f".{volume_id}.{secrets.token_hex(6)}.part"
    # Made by us with O_EXCL before qemu-img sees the name: it must never follow a link that somebody put there.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory))
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)


def _remove_leftovers(directory: int, volume_id: str) -> None:
    """Remove what a killed agent left. By age of the last write: a lock would clash with QEMU's own on NFS."""
    for name in os.listdir(directory):
        if name.startswith(f".{volume_id}.") and name.endswith(".part"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime > _ABANDONED_AFTER_S:
                    os.unlink(name, dir_fd=directory)


def publish(directory: int, temporary: str, name: str) -> None:
    """Give a file that is whole its name. AlreadyExists where somebody was faster."""
    descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        # A link, not a rename: it never replaces what another call made meanwhile.
        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    except FileExistsError as error:
        raise AlreadyExists("volume-exists", f"{name} was made by somebody else meanwhile") from error
    sync_directory(directory)


def _clone_image(volume: VolumeSpec, layout: PoolLayout, directory: int, temporary: str) -> None:
    if volume.format is not DiskFormat.QCOW2:
        raise InvalidRequest("volume-format", "a linked clone of an image is qcow2, not raw", field="format")
    format, base_bytes = _base_of(volume, layout)
    size_bytes = _size_over_base(volume, base_bytes)
    base = layout.image(volume.base_image_id, format)
    driver = "qcow2" if format is DiskFormat.QCOW2 else "raw"
    # The size is given, so that qemu-img does not have to open the base; -u keeps it from doing so.
    _qemu_img(["create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", driver, temporary, str(size_bytes)], directory)


def _copy_image(
    volume: VolumeSpec, layout: PoolLayout, directory: int, temporary: str, watch: "CopyWatch", key: bytes | None
) -> None:
    format, image_bytes = _find_image(volume.copy_image_id, layout)
    size_bytes = _size_over_base(volume, image_bytes)
    source, driver = layout.image(volume.copy_image_id, format), "qcow2" if format is DiskFormat.QCOW2 else "raw"
    target = volume.format.value
    limits = qemu_img.Limits(timeout_s=60 + image_bytes / _COPY_FLOOR_BYTES_S, cpu_s=60 + image_bytes // (16 << 20))
    options = ["-o", ENCRYPTION] if key is not None else []
    arguments = ["convert", "-q", "-f", driver, "-O", target, *options, source, temporary]

    def tick() -> None:
        with contextlib.suppress(FileNotFoundError):  # it removes what it could not make
            watch.on_bytes(os.stat(temporary, dir_fd=directory, follow_symlinks=False).st_blocks * _SECTOR)

    qemu_img.run(arguments, directory=directory, limits=limits, cancelled=watch.cancelled, on_tick=tick, key=key)
    if size_bytes > image_bytes:
        _qemu_img(_resize_arguments(volume, temporary, size_bytes), directory, key=key)


def _resize_arguments(volume: VolumeSpec, name: str, size_bytes: int) -> list[str]:
    if not volume.is_encrypted:
        return ["resize", "-q", "-f", volume.format.value, name, str(size_bytes)]
    # Only these options have room for a key. Plain words of ours all of them: nothing to escape.
    opened = f"driver=qcow2,file.driver=file,file.filename={name},encrypt.format=luks,encrypt.key-secret={qemu_img.KEY_ID}"
    return ["resize", "-q", "--image-opts", opened, str(size_bytes)]


def _lay_over(volume: VolumeSpec, layout: PoolLayout, directory: int, temporary: str) -> None:
    """Make an empty layer: what is read from it is what lies below."""
    base = layout.volume(volume.base_volume_id, DiskFormat.QCOW2, volume.base_layer_id)
    size_bytes = _size_over_base(volume, _layer_bytes(directory, os.path.basename(base)))
    _qemu_img(["create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", temporary, str(size_bytes)], directory)


def _copy_layer(volume: VolumeSpec, layout: PoolLayout, directory: int, temporary: str, watch: "CopyWatch") -> None:
    source = layout.volume(volume.copy_volume_id, DiskFormat.QCOW2, volume.copy_layer_id)
    source_bytes = _layer_bytes(directory, os.path.basename(source))
    size_bytes = _size_over_base(volume, source_bytes)
    limits = qemu_img.Limits(timeout_s=60 + source_bytes / _COPY_FLOOR_BYTES_S, cpu_s=60 + source_bytes // (16 << 20))

    def tick() -> None:
        watch.on_bytes(os.stat(temporary, dir_fd=directory, follow_symlinks=False).st_blocks * _SECTOR)

    target = volume.format.value
    arguments = ["convert", "-q", "-f", "qcow2", "-O", target, source, temporary]
    qemu_img.run(arguments, directory=directory, limits=limits, cancelled=watch.cancelled, on_tick=tick)
    if size_bytes > source_bytes:
        _qemu_img(["resize", "-q", "-f", target, temporary, str(size_bytes)], directory)


def _layer_bytes(directory: int, name: str) -> int:
    if regular_file(directory, name) is None:
        raise NotFound("layer-not-found", f"the layer {name} is not in this pool on this host")
    return _virtual_size(directory, name)


def _qemu_img(arguments: list[str], directory: int, *, key: bytes | None = None) -> None:
    qemu_img.run(arguments, directory=directory, limits=qemu_img.Limits(), key=key)


def _check_encryption(volume: VolumeSpec, key: bytes | None) -> None:
    """Refuse what would leave bytes of an encrypted volume in the clear."""
    if volume.is_encrypted and (
        volume.format is not DiskFormat.QCOW2 or volume.base_image_id or volume.base_volume_id or volume.copy_volume_id
    ):
        raise InvalidRequest(
            "volume-encrypted",
            "an encrypted volume is qcow2, empty or copied from an image, and has no layers",
            field="is_encrypted",
        )
    if volume.is_encrypted != (key is not None):
        raise Unavailable("volume-key-missing", f"the key of volume {volume.volume_id} is not on this host; it is given again")


def _check_size(volume: VolumeSpec) -> None:
    sources = [volume.base_image_id, volume.copy_image_id, volume.base_volume_id, volume.copy_volume_id]
    has_source = any(sources)
    if sum(map(bool, sources)) > 1:
        raise InvalidRequest("volume-sources", "a volume is a clone or a copy of one thing only", field="copy_image_id")
    if volume.size_bytes % _SECTOR or not (0 if has_source else _SECTOR) <= volume.size_bytes <= _MAX_VOLUME_BYTES:
        raise InvalidRequest(
            "volume-size",
            f"size_bytes {volume.size_bytes} must be a multiple of 512 up to {_MAX_VOLUME_BYTES}",
            field="size_bytes",
        )


def _size_over_base(volume: VolumeSpec, base_bytes: int) -> int:
    size_bytes = volume.size_bytes or base_bytes
    if size_bytes < base_bytes:
        raise InvalidRequest(
            "volume-smaller-than-image",
            f"size_bytes {size_bytes} is less than the image's {base_bytes}",
            field="size_bytes",
        )
    return size_bytes


def _base_of(volume: VolumeSpec, layout: PoolLayout) -> tuple[DiskFormat, int]:
    found = _find_image(volume.base_image_id, layout)
    if volume.base_image_format not in (None, found[0]):
        raise Conflict("image-format-differs", f"image {volume.base_image_id} is stored as {found[0].value} here")
    return found


def _find_image(image_id: str, layout: PoolLayout) -> tuple[DiskFormat, int]:
    with layout.open(IMAGES) as directory:
        for format in DiskFormat:
            name = image_name(image_id, format)
            if regular_file(directory, name):
                return format, _virtual_size(directory, name)
    raise NotFound("image-not-found", f"image {image_id} is not in pool {layout.pool_id} on this host", image_id=image_id)


def _compare(volume: VolumeSpec, layout: PoolLayout, directory: int, name: str) -> None:
    size_bytes = _virtual_size(directory, name)
    if volume.size_bytes and size_bytes != volume.size_bytes:
        raise Conflict(
            "volume-differs",
            f"volume {volume.volume_id} has {size_bytes} bytes, not {volume.size_bytes}",
            size_bytes=size_bytes,
        )
    wanted = {layout.image(volume.base_image_id, format) for format in DiskFormat} if volume.base_image_id else {""}
    if volume.base_volume_id:
        wanted = {layout.volume(volume.base_volume_id, DiskFormat.QCOW2, volume.base_layer_id)}
    if backing_file(directory, name) not in wanted:
        raise Conflict("volume-differs", f"volume {volume.volume_id} exists with another base image")
    if _is_encrypted(directory, name) is not volume.is_encrypted:
        raise Conflict("volume-differs", f"volume {volume.volume_id} exists {'un' if volume.is_encrypted else ''}encrypted")


def _is_encrypted(directory: int, name: str) -> bool:
    """Tell by its header whether the file is encrypted as ours are."""
    if not name.endswith(".qcow2"):
        return False
    with _opened(directory, name) as descriptor:
        return int.from_bytes(os.pread(descriptor, 4, _CRYPT_METHOD_OFFSET), "big") == _LUKS


def _observe(volume_id: str, directory: int, name: str) -> VolumeObservation:
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    return VolumeObservation(
        volume_id=volume_id,
        is_present=True,
        size_bytes=_virtual_size(directory, name),
        allocated_bytes=found.st_blocks * _SECTOR,
    )


def _virtual_size(directory: int, name: str) -> int:
    with _opened(directory, name) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        if not name.endswith(".qcow2"):
            return size_bytes
        return qcow2_virtual_size(os.pread(descriptor, 32, 0))


def backing_file(directory: int, name: str) -> str:
    """Return the path that the file's header says it lies over; "" for none."""
    if not name.endswith(".qcow2"):
        return ""
    with _opened(directory, name) as descriptor:
        return qcow2_backing_file(lambda length, offset: os.pread(descriptor, length, offset))


@contextlib.contextmanager
def _opened(directory: int, name: str) -> Iterator[int]:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
