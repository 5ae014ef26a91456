"""Backups of stopped domains: `qemu-nbd` serves each disk read-only, with the persistent bitmap of the last checkpoint where it is whole.

Nothing is started. Before it is read each disk gets a bitmap of the new checkpoint's name, which whoever writes to it by QEMU from then
on fills, the running vm too. The name is the backup's own, and that is what tells a disk apart that went back to an earlier state
behind Trimtab's back, by a copy of its file or a snapshot of the storage below: an older checkpoint's bitmap came back with it and would
say nothing of what was written, backed up and lost since. QEMU's own locks hold on files: a vm that is started meanwhile is refused its
image, and a disk that another host has open is neither marked nor read. What is no qcow2 has no bitmap and is read whole.

Whether a bitmap says all is read from the files, and not from what libvirt of this host knows: it goes with a guest that moves. QEMU looks
for a bitmap in the file and then in those below, and takes the first: where the disk was laid over by a snapshot since its checkpoint,
that one misses what was written above it, or below. Such a disk is read whole.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from trimtab_agent.backup.nbd import ALLOCATION, NbdClient
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.restoring import network_volume, read_only_volume
from trimtab_agent.backup.source import DiskWish, Instant, ServedDisk
from trimtab_agent.hypervisor.kvm import qemu_img
from trimtab_agent.hypervisor.kvm.block_pools import secret_object
from trimtab_agent.hypervisor.kvm.disk_sources import DiskSource
from trimtab_agent.hypervisor.kvm.lent_secrets import in_memory
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_protos.errors import Conflict, TrimtabError

log = structlog.get_logger(__name__)

_BITMAP_ROOM_BYTES = 1 << 30
NOT_KEPT = "the vm does not run, and what changed on a disk that is not qcow2 is known only to the QEMU that changed it"


@contextlib.contextmanager
def stopped_instant(
    wishes: Sequence[DiskWish], sources: Mapping[str, DiskSource], socket: Path, keys: VolumeKeys, *, checkpoint: str
) -> Iterator[Instant]:
    """Serve the disks as they lie; Conflict `image-locked` where one of them is in use after all, Unavailable `volume-key-missing`."""
    notes = {"stopped": "the vm did not run: its disks were read as it left them"}
    unmarked = _mark((sources[wish.name] for wish in wishes), checkpoint)
    if unmarked:
        notes["unmarked"] = unmarked
    with contextlib.ExitStack() as stack:
        served = [_serve(stack, wish, sources[wish.name], socket, keys) for wish in wishes]
        instant_ms = time.time_ns() // 1_000_000
        marked = "" if unmarked else None
        yield Instant(instant_ms, Consistency.FILESYSTEM, served, notes=notes, checkpoint=marked, is_at_rest=True)


def _mark(sources: Iterable[DiskSource], checkpoint: str) -> str:
    """Give each disk that can keep one a bitmap of this name; return why one cannot, and what is read in full next time for that."""
    for source in sources:
        if not source.keeps_bitmaps or checkpoint in marks_of(Path(source.path)):
            continue
        try:
            _change(Path(source.path), "--add", checkpoint)
        except TrimtabError as error:
            if error.code == "image-locked":
                raise
            return f"the next one reads all: {error.message}"[:300]
    return ""


def marks_of(file: Path) -> tuple[str, ...]:
    """Return the names of the persistent bitmaps of a disk that no QEMU has open; of its own layer, not of those below."""
    [layer, *_below] = _layers(file)
    return tuple(str(one.get("name", "")) for one in _bitmaps_of(layer))


def drop_marks(sources: Iterable[DiskSource], is_dropped: Callable[[str], bool]) -> None:
    """Remove the bitmaps of these names from a stopped vm's disks. Idempotent.

    One that is in use by now keeps them: they cost it a little, until the next backup.
    """
    for source in sources:
        if not source.keeps_bitmaps:
            continue
        try:
            for name in marks_of(Path(source.path)):
                if is_dropped(name):
                    _change(Path(source.path), "--remove", name)
        except TrimtabError as error:
            log.info("older checkpoints stay for now", path=source.path, error=error.message)


def _change(file: Path, how: str, bitmap: str) -> None:
    with _folder_of(file) as directory:
        # It grows by a cluster or two wherever the file ends now.
        limits = qemu_img.Limits(file_bytes=file.stat().st_size + _BITMAP_ROOM_BYTES)
        qemu_img.run(["bitmap", how, "-f", "qcow2", "--", file.name, bitmap], directory=directory, limits=limits)


def _serve(stack: contextlib.ExitStack, wish: DiskWish, source: DiskSource, socket: Path, keys: VolumeKeys) -> ServedDisk:
    at = socket.with_name(f"{socket.stem}-{wish.name}.sock")
    base = wish.base_checkpoint
    if not source.keeps_bitmaps:
        return ServedDisk(wish.name, _whole(stack, wish.name, source, at, keys), denied=NOT_KEPT if base else "")
    denied = why_not_all(Path(source.path), base) if base else ""
    if base and not denied:
        try:
            context = f"qemu:dirty-bitmap:{base}"
            client = stack.enter_context(
                read_only_volume(Path(source.path), format=source.format, socket=at, bitmap=base, contexts=(ALLOCATION, context))
            )
            return ServedDisk(wish.name, client, context)
        except TrimtabError as error:
            if error.code == "image-locked":
                raise
            denied = f"its checkpoint cannot be read: {error.message}"
    return ServedDisk(wish.name, _whole(stack, wish.name, source, at, keys), "", denied)


def why_not_all(file: Path, bitmap: str) -> str:
    """Return why a persistent bitmap of a disk that no QEMU has open does not say all that changed since it was made; "" where it does."""
    flags = [_flags_of(layer, bitmap) for layer in _layers(file)]
    if all(one is None for one in flags):
        return (
            f"its checkpoint cannot be read: the disk does not carry {bitmap}, which a QEMU that is killed takes with it, and which is "
            "not in an earlier state of the disk"
        )
    if any(one is not None for one in flags[1:]):
        return f"the disk was laid over by a snapshot after {bitmap}, so that no single bitmap says all that changed"
    if "in-use" in (flags[0] or ()):
        return f"its checkpoint cannot be read: the QEMU that kept {bitmap} was killed"
    return ""


def _flags_of(layer: Mapping[str, Any], bitmap: str) -> Sequence[str] | None:
    """Return the flags of a layer's bitmap, None where it has none of this name."""
    return next((one.get("flags", ()) for one in _bitmaps_of(layer) if one.get("name") == bitmap), None)


def _bitmaps_of(layer: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = layer.get("format-specific", {}).get("data", {}).get("bitmaps", ())
    return found


def _layers(file: Path) -> Sequence[Mapping[str, Any]]:
    """Return what the header of each layer of a qcow2 disk says, the one that is written to first."""
    with _folder_of(file) as directory:
        command = ["info", "--output=json", "--backing-chain", "-f", "qcow2", "--", file.name]
        layers: Sequence[Mapping[str, Any]] = json.loads(qemu_img.run(command, directory=directory, limits=qemu_img.Limits()))
        return layers


@contextlib.contextmanager
def _folder_of(file: Path) -> Iterator[int]:
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory
    finally:
        os.close(directory)


def _whole(stack: contextlib.ExitStack, name: str, source: DiskSource, at: Path, keys: VolumeKeys) -> NbdClient:
    if source.path:
        return stack.enter_context(read_only_volume(Path(source.path), format=source.format, socket=at))
    if not source.options:
        raise Conflict("disk-not-readable", f"{name} lies in a network that is read while its vm runs only", disk=name)
    secret = keys.of_secret(source.secret_uuid) if source.secret_uuid else None
    descriptor = stack.enter_context(in_memory(secret))
    lent = [] if descriptor is None else [descriptor]
    objects = [secret_object(f"/proc/self/fd/{one}", is_ceph_key=source.is_ceph) for one in lent]
    return stack.enter_context(network_volume(source.options, socket=at, objects=objects, pass_fds=lent))
