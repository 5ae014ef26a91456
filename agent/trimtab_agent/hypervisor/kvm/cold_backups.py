"""Backups of stopped domains: `qemu-nbd` serves each disk read-only, with the persistent bitmap of the last checkpoint where it is whole.

Nothing is started and nothing is marked: the bitmap goes on from the older checkpoint, so that the next increment, of the running vm
too, reads what changed since then, which is all that it needs and a little more. QEMU's own locks hold on files: a vm that is started
meanwhile is refused its image, and a disk that another host has open is not read. What is no qcow2 has no bitmap and is read whole.

Whether a bitmap says all is read from the files, and not from what libvirt of this host knows: it goes with a guest that moves. QEMU looks
for a bitmap in the file and then in those below, and takes the first: where the disk was laid over by a snapshot since its checkpoint,
that one misses what was written above it, or below. Such a disk is read whole.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab_agent.backup.nbd import ALLOCATION, NbdClient
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.restoring import network_volume, read_only_volume
from trimtab_agent.backup.source import DiskWish, Instant, ServedDisk, common
from trimtab_agent.hypervisor.kvm import qemu_img
from trimtab_agent.hypervisor.kvm.block_pools import secret_object
from trimtab_agent.hypervisor.kvm.disk_sources import DiskSource
from trimtab_agent.hypervisor.kvm.lent_secrets import in_memory
from trimtab_agent.hypervisor.kvm.volume_keys import VolumeKeys
from trimtab_protos.errors import Conflict, TrimtabError

NOT_KEPT = "the vm does not run, and what changed on a disk that is not qcow2 is known only to the QEMU that changed it"


@contextlib.contextmanager
def stopped_instant(
    wishes: Sequence[DiskWish], sources: Mapping[str, DiskSource], socket: Path, keys: VolumeKeys
) -> Iterator[Instant]:
    """Serve the disks as they lie; Conflict `image-locked` where one of them is in use after all, Unavailable `volume-key-missing`."""
    with contextlib.ExitStack() as stack:
        served = [_serve(stack, wish, sources[wish.name], socket, keys) for wish in wishes]
        notes = {"stopped": "the vm did not run: its disks were read as it left them"}
        yield Instant(time.time_ns() // 1_000_000, Consistency.FILESYSTEM, served, notes=notes, checkpoint=common(served, wishes))


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
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        command = ["info", "--output=json", "--backing-chain", "-f", "qcow2", "--", file.name]
        layers = json.loads(qemu_img.run(command, directory=directory, limits=qemu_img.Limits()))
    finally:
        os.close(directory)
    flags = [_flags_of(layer, bitmap) for layer in layers]
    if all(one is None for one in flags):
        return f"its checkpoint cannot be read: the disk does not carry {bitmap}, which a QEMU that is killed takes with it"
    if any(one is not None for one in flags[1:]):
        return f"the disk was laid over by a snapshot after {bitmap}, so that no single bitmap says all that changed"
    if "in-use" in (flags[0] or ()):
        return f"its checkpoint cannot be read: the QEMU that kept {bitmap} was killed"
    return ""


def _flags_of(layer: Mapping[str, Any], bitmap: str) -> Sequence[str] | None:
    """Return the flags of a layer's bitmap, None where it has none of this name."""
    kept = layer.get("format-specific", {}).get("data", {}).get("bitmaps", ())
    return next((one.get("flags", ()) for one in kept if one.get("name") == bitmap), None)


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
