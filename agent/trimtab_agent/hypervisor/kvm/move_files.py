"""The files of a volume that moves between two pools of a host: which one is the volume, and how the other one goes.

The rule that survives any crash: the volume is the file in the source pool for as long as that is there, else the one in the target
pool. A copy that is not whole has a mark beside it (`.<volume_id>.moving`), so that it is never taken for the volume, not even where
the source is missing for another reason (a file system that is not mounted).
Under a guest that runs, QEMU keeps both equal; the guest is held still while the mark goes and then the source. Without one, the copy
is made whole first, and the source goes when the controller has recorded where the volume is.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

from trimtab_agent.hypervisor.kvm import os_errors, qemu_img, state_files, volumes
from trimtab_agent.hypervisor.kvm.pool_layout import (
    NVRAM_FILE,
    VOLUMES,
    PoolLayout,
    regular_file,
    sync_directory,
    volume_name,
)
from trimtab_protos.errors import Conflict, NotFound
from trimtab_protos.messages import DiskSpec, VolumeSpec
from trimtab_protos.volume_messages import VolumeMove

_FLOOR_BYTES_S = 4 << 20
"""Storage slower than this is broken; bounds how long a copy may take."""
# QEMU's: it locks one byte for each right that it has on an image, and one for each that it does not grant to others.
_LOCKED_RANGES = ((100, 16), (200, 16))
_NO_SUCH_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})
_NVRAM_MAX_BYTES = 64 << 20


def source_path(move: VolumeMove) -> str:
    return PoolLayout.of(move.source_pool).volume(move.volume_id, move.source_format)


def target_path(move: VolumeMove) -> str:
    return PoolLayout.of(move.target_pool).volume(move.volume_id, move.target_format)


def is_at_source(move: VolumeMove) -> bool:
    """Tell whether the source's file is the volume. Conflict where neither can be trusted to be it; NotFound: there is none."""
    if _exists(PoolLayout.of(move.source_pool), volume_name(move.volume_id, move.source_format)):
        return True
    require_whole(move.volume_id, PoolLayout.of(move.target_pool), volume_name(move.volume_id, move.target_format))
    return False


def require_whole(volume_id: str, target: PoolLayout, name: str) -> None:
    """Raise where the file in the target pool is not, or not certainly, the whole volume."""
    if not _exists(target, name):
        raise NotFound("volume-not-found", f"volume {volume_id} is in neither of the pools that it moves between")
    if _exists(target, _mark(volume_id)):
        raise Conflict(
            "volume-half-moved",
            f"volume {volume_id} is not in the pool that it moves from, and its copy in pool {target.pool_id} is not whole; is the "
            f"former pool's file system mounted?",
        )


def resolve(disk: DiskSpec, layouts: dict[str, PoolLayout]) -> DiskSpec:
    """Return the disk of a spec where it is now."""
    assert disk.move_format is not None, "a disk that moves has a format where it goes"
    here = replace(disk, move_pool_id="", move_format=None)
    if _exists(layouts[disk.pool_id], volume_name(disk.volume_id, disk.format, disk.layer_id)):
        return here
    target = layouts[disk.move_pool_id]
    require_whole(disk.volume_id, target, volume_name(disk.volume_id, disk.move_format))
    return replace(here, pool_id=disk.move_pool_id, format=disk.move_format, layer_id="")


def begin_mirror(move: VolumeMove) -> None:
    """Make the empty file that QEMU fills, with the mark that says so."""
    layout = PoolLayout.of(move.target_pool)
    with _files(move), layout.open(VOLUMES) as directory:
        volumes.delete(move.volume_id, layout)
        flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(_mark(move.volume_id), flags, 0o600, dir_fd=directory))
        sync_directory(directory)
    empty = VolumeSpec(
        volume_id=move.volume_id, pool_id=move.target_pool.pool_id, format=move.target_format, size_bytes=move.size_bytes
    )
    volumes.ensure(empty, layout)


def drop_copy(move: VolumeMove) -> None:
    """Remove what was made in the target pool, whole or not."""
    layout = PoolLayout.of(move.target_pool)
    volumes.delete(move.volume_id, layout)
    with _files(move), layout.open(VOLUMES) as directory:
        _unlink(directory, _mark(move.volume_id))
        sync_directory(directory)
    if move.takes_state_files:
        state_files.remove(move.vm_id, move.target_pool)


def drop_source(move: VolumeMove) -> None:
    """Remove the volume from the pool that it left; the caller has made sure that nothing uses it."""
    volumes.delete(move.volume_id, PoolLayout.of(move.source_pool))
    if move.takes_state_files:
        state_files.remove(move.vm_id, move.source_pool)


def let_go(move: VolumeMove, is_still_ours: Callable[[], bool]) -> None:
    """Make the target the volume: its mark goes, then the source. The guest is held still; repeated it changes nothing.

    Conflict (`image-locked`): somebody else has the source open, so that this host must have lost the guest; nothing was changed.
    `is_still_ours` is asked when nobody else can open the source any more.
    """
    source, target = PoolLayout.of(move.source_pool), PoolLayout.of(move.target_pool)
    name = volume_name(move.volume_id, move.source_format)
    with _files(move), source.open(VOLUMES) as left, target.open(VOLUMES) as directory:
        if regular_file(left, name) is None:
            _unlink(directory, _mark(move.volume_id))
            return
        with alone_with(left, name):
            if not is_still_ours():
                raise Conflict("guest-ended", f"the guest of volume {move.volume_id} ended while the volume was moved")
            _sync_file(directory, volume_name(move.volume_id, move.target_format))
            _unlink(directory, _mark(move.volume_id))
            sync_directory(directory)
            _unlink(left, name)
            sync_directory(left)


@contextlib.contextmanager
def alone_with(directory: int, name: str) -> Iterator[None]:
    """Keep every QEMU, of other hosts too, from opening the image while the block runs. Conflict (`image-locked`) where one has it."""
    descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        for start, length in _LOCKED_RANGES:
            wanted = struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
            try:
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
            except OSError as error:
                if error.errno in _NO_SUCH_LOCKS:
                    continue  # QEMU goes without them there too
                raise Conflict("image-locked", f"a QEMU, here or on another host, has {name} open") from error
        yield
    finally:
        os.close(descriptor)


def copy(move: VolumeMove, watch: volumes.CopyWatch) -> None:
    """Make a whole copy in the target pool of a volume that no guest has open, seen through all that it lies over.

    Conflict (`image-locked`): a guest has it open.
    """
    layout = PoolLayout.of(move.target_pool)
    volumes.delete(move.volume_id, layout)  # what an earlier attempt left may be half
    limits = qemu_img.Limits(
        timeout_s=60 + move.size_bytes / min(_FLOOR_BYTES_S, move.bandwidth_bytes_s or _FLOOR_BYTES_S),
        cpu_s=60 + move.size_bytes // (16 << 20),
    )
    rate = ["-r", str(move.bandwidth_bytes_s)] if move.bandwidth_bytes_s else []
    formats = ["-f", move.source_format.value, "-O", move.target_format.value]
    with _files(move), layout.open(VOLUMES) as directory, volumes.unfinished(directory, move.volume_id) as temporary:

        def tick() -> None:
            watch.on_bytes(os.stat(temporary, dir_fd=directory, follow_symlinks=False).st_blocks * 512)

        arguments = ["convert", "-q", *rate, *formats, source_path(move), temporary]
        qemu_img.run(arguments, directory=directory, limits=limits, cancelled=watch.cancelled, on_tick=tick)
        volumes.publish(directory, temporary, volume_name(move.volume_id, move.target_format))
        _unlink(directory, _mark(move.volume_id))
    if move.takes_state_files:
        _copy_nvram(move)


def _copy_nvram(move: VolumeMove) -> None:
    with _files(move), PoolLayout.of(move.source_pool).open_vm(move.vm_id, create=False) as directory:
        if directory is None or regular_file(directory, NVRAM_FILE) is None:
            return
        with os.fdopen(os.open(NVRAM_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), "rb") as file:
            content = file.read(_NVRAM_MAX_BYTES)
    state_files.restore_nvram(move.vm_id, move.target_pool, content)


def _mark(volume_id: str) -> str:
    return f".{volume_id}.moving"


def _exists(layout: PoolLayout, name: str) -> bool:
    with layout.open(VOLUMES) as directory:
        return regular_file(directory, name) is not None


def _unlink(directory: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _sync_file(directory: int, name: str) -> None:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _files(move: VolumeMove) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise os_errors.from_os(error, doing=f"move volume {move.volume_id}") from error
