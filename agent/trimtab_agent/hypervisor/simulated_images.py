"""Image imports of the simulated hypervisor: the same refusals as the real one for the cases that tests bring, no QEMU."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from trimtab_agent.hypervisor import simulated_layer_files
from trimtab_agent.hypervisor.base import JobControl
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.simulation import PoolStore, StoredImage
from trimtab_protos.errors import Conflict, InvalidRequest, NoCapacity, NotFound, Unavailable
from trimtab_protos.messages import (
    DiskFormat,
    DomainSpec,
    HostFileSource,
    ImageResult,
    ImageSource,
    ImageSpec,
    JobProgress,
    PeerSource,
    PoolSpec,
    UploadSource,
    UrlSource,
    VolumeSource,
)

if TYPE_CHECKING:
    from trimtab_agent.hypervisor.simulated import SimulatedHypervisor

QCOW2_MAGIC = b"QFI\xfb"
MADE_UP_BYTES = 1 << 20


def bring(
    host: "SimulatedHypervisor", image: ImageSpec, pool: PoolSpec, *, source: ImageSource, control: JobControl
) -> ImageResult:
    check_id(image.image_id, "image_id")
    store = host.open_store(pool)
    with host.fleet.lock:
        known = store.images.get(image.image_id)
    if known is not None:
        if image.source_sha256 and known.result.source_sha256 != image.source_sha256:
            raise Conflict("image-differs", f"pool {pool.pool_id} has another image {image.image_id}")
        return known.result
    if isinstance(source, VolumeSource):
        blocks_of_volume = simulated_layer_files.content_of(store, source)
        image = replace(image, format=DiskFormat.RAW)
        content = _Content(image, control)
        return _store(host, store, image, pool, source, content, content.checked(blocks_of_volume))
    content = _Content(image, control)
    blocks = content.checked(_blocks(host, image, pool, source=source, control=control, on_size=content.refuse_size))
    return _store(host, store, image, pool, source, content, blocks)


def _store(
    host: "SimulatedHypervisor",
    store: PoolStore,
    image: ImageSpec,
    pool: PoolSpec,
    source: ImageSource,
    content: "_Content",
    blocks: Iterator[bytes],
) -> ImageResult:
    path, digest, size = host.fleet.keep_content(blocks)
    _check_digest(image, source, digest)
    virtual_size_bytes = content.virtual_size_bytes(size)
    stored_digest = digest
    if image.format is DiskFormat.RAW:
        # Raw images are stored as qcow2, as the real hypervisor does, so that volumes can be clones of them.
        path, stored_digest, size = host.fleet.keep_content(_as_qcow2(path, virtual_size_bytes))
    result = ImageResult(
        image_id=image.image_id,
        format=DiskFormat.QCOW2 if image.format is DiskFormat.RAW else image.format,
        virtual_size_bytes=virtual_size_bytes,
        file_size_bytes=size,
        source_sha256=digest,
        stored_sha256=stored_digest,
    )
    with host.fleet.lock:
        if store.capacity_bytes - store.used_bytes < size:
            raise NoCapacity("pool-full", f"pool {pool.pool_id} has no room left", pool_id=pool.pool_id)
        store.images[image.image_id] = StoredImage(image, result, path)
    return result


def _check_digest(image: ImageSpec, source: ImageSource, digest: str) -> None:
    wanted = source.stored_sha256 if isinstance(source, PeerSource) else image.source_sha256
    if wanted and digest != wanted:
        raise InvalidRequest("image-checksum-mismatch", "the content's SHA-256 is not the one declared", sha256=digest)


def _as_qcow2(path: str, virtual_size_bytes: int) -> Iterator[bytes]:
    yield qcow2_header(virtual_size_bytes)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


class _Content:
    """Looks at what passes by: header, bound, cancel."""

    def __init__(self, image: ImageSpec, control: JobControl) -> None:
        self._image = image
        self._control = control
        self._header = b""

    def checked(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        done = 0
        for block in blocks:
            if self._control.cancelled.is_set():
                raise Conflict("job-cancelled", "the import was cancelled")
            if len(self._header) < 32:
                self._header += block[:32]
            done += len(block)
            self.refuse_size(done)
            self._control.report(JobProgress(done_bytes=done, phase="reading"))
            yield block
        self._check_header()

    def refuse_size(self, size_bytes: int) -> None:
        if self._image.max_bytes and size_bytes > self._image.max_bytes:
            raise InvalidRequest("image-too-large", f"the image is larger than {self._image.max_bytes} bytes")

    def virtual_size_bytes(self, file_size_bytes: int) -> int:
        if self._image.format is DiskFormat.QCOW2:
            return int.from_bytes(self._header[24:32], "big")
        return file_size_bytes

    def _check_header(self) -> None:
        is_qcow2 = self._header.startswith(QCOW2_MAGIC)
        if is_qcow2 != (self._image.format is DiskFormat.QCOW2):
            raise InvalidRequest("image-format-mismatch", f"the content is not {self._image.format.value}, as was declared")
        if is_qcow2 and int.from_bytes(self._header[8:16], "big"):
            raise InvalidRequest("image-has-backing-file", "the image refers to another file")
        if is_qcow2 and self._image.max_bytes and self.virtual_size_bytes(0) > self._image.max_bytes:
            raise InvalidRequest("image-too-large", f"the disk in the image is larger than {self._image.max_bytes} bytes")


def _blocks(
    host: "SimulatedHypervisor",
    image: ImageSpec,
    pool: PoolSpec,
    *,
    source: ImageSource,
    control: JobControl,
    on_size: Callable[[int], None],
) -> Iterator[bytes]:
    if host.reader is not None:
        return host.reader.read_blocks(source, pool, control, on_size=on_size)
    match source:
        case PeerSource():
            return _peer_blocks(host, image, source)
        case UploadSource() | UrlSource() | HostFileSource() | VolumeSource():
            return iter((made_up_content(image.format, seed=repr(source)),))


def _peer_blocks(host: "SimulatedHypervisor", image: ImageSpec, source: PeerSource) -> Iterator[bytes]:
    peer = host.fleet.hosts.get(source.host_id)
    pool = peer.pools.get(source.pool_id) if peer else None
    if peer is None or pool is None:
        raise Unavailable("peer-down", f"host {source.host_id} cannot be reached", host_id=source.host_id)
    with open(peer.open_image(image.image_id, pool), "rb") as file:
        while block := file.read(1 << 20):
            yield block


def made_up_content(image_format: DiskFormat, *, seed: str, virtual_size_bytes: int = 1 << 30) -> bytes:
    """Return a small image that is valid for this simulation; the same for the same seed."""
    filler = hashlib.sha256(seed.encode()).digest() * (MADE_UP_BYTES // 32)
    if image_format is not DiskFormat.QCOW2:
        return filler
    header = qcow2_header(virtual_size_bytes)
    return header + filler[len(header) :]


def qcow2_header(virtual_size_bytes: int) -> bytes:
    """Return the first bytes of a qcow2 image: magic, version, no backing file, virtual size."""
    return QCOW2_MAGIC + (3).to_bytes(4, "big") + bytes(16) + virtual_size_bytes.to_bytes(8, "big")


def require_medium(host: "SimulatedHypervisor", domain: DomainSpec) -> None:
    """Make sure that the image in the vm's drive is there."""
    if domain.cdrom is None or not domain.cdrom.image_id:
        return
    pool = next(pool for pool in domain.pools if pool.pool_id == domain.cdrom.pool_id)
    if domain.cdrom.image_id not in host.open_store(pool).images:
        raise NotFound("image-not-found", f"pool {pool.pool_id} has no image {domain.cdrom.image_id}")


def path_of(host: "SimulatedHypervisor", image_id: str, pool: PoolSpec) -> str:
    with host.fleet.lock:
        found = host.open_store(pool).images.get(image_id)
        if found is None:
            raise NotFound("image-not-found", f"pool {pool.pool_id} has no image {image_id}")
        return found.path


def delete(host: "SimulatedHypervisor", image_id: str, pool: PoolSpec) -> None:
    with host.fleet.lock:
        store = host.open_store(pool)
        clones = [each.spec.volume_id for each in store.volumes.values() if each.spec.base_image_id == image_id]
        if clones:
            raise Conflict("image-in-use", f"volume {clones[0]} is a linked clone of image {image_id}", volumes=len(clones))
        store.images.pop(image_id, None)
