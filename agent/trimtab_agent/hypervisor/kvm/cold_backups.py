"""Backups of stopped domains: `qemu-nbd` serves each disk read-only, with the persistent bitmap of the last checkpoint where it is whole.

Nothing is started and nothing is marked: the bitmap goes on from the older checkpoint, so that the next increment, of the running vm
too, reads what changed since then, which is all that it needs and a little more. QEMU's own locks hold: a vm that is started
meanwhile is refused its image, and a disk that another host has open is not read.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trimtab_agent.backup.nbd import ALLOCATION
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.restoring import read_only_volume
from trimtab_agent.backup.source import DiskWish, Instant, ServedDisk, common
from trimtab_protos.errors import Conflict, NotFound, TrimtabError


@contextlib.contextmanager
def stopped_instant(
    wishes: Sequence[DiskWish], files: Mapping[str, tuple[str, str]], present: set[str], socket: Path
) -> Iterator[Instant]:
    """Serve the disks as they lie; Conflict `image-locked` where one of them is in use after all."""
    with contextlib.ExitStack() as stack:
        served = [_serve(stack, wish, files, present, socket) for wish in wishes]
        notes = {"stopped": "the vm did not run: its disks were read as it left them"}
        yield Instant(time.time_ns() // 1_000_000, Consistency.FILESYSTEM, served, notes=notes, checkpoint=common(served, wishes))


def _serve(
    stack: contextlib.ExitStack, wish: DiskWish, files: Mapping[str, tuple[str, str]], present: set[str], socket: Path
) -> ServedDisk:
    if wish.name not in files:
        raise NotFound("disk-not-found", f"the domain has no disk {wish.name}", disk=wish.name)
    file, format = files[wish.name]
    if format != "qcow2":
        raise Conflict("disk-not-qcow2", f"{wish.name} is {format}; changes can be followed on qcow2 only", disk=wish.name)
    at = socket.with_name(f"{socket.stem}-{wish.name}.sock")
    base = wish.base_checkpoint
    denied = f"this host does not know the checkpoint {base}" if base and base not in present else ""
    if base and not denied:
        try:
            context = f"qemu:dirty-bitmap:{base}"
            client = stack.enter_context(
                read_only_volume(Path(file), format=format, socket=at, bitmap=base, contexts=(ALLOCATION, context))
            )
            return ServedDisk(wish.name, client, context)
        except TrimtabError as error:
            if error.code == "image-locked":
                raise
            denied = f"its checkpoint cannot be read: {error.message}"  # QEMU was killed: the bitmap is marked in use
    client = stack.enter_context(read_only_volume(Path(file), format=format, socket=at))
    return ServedDisk(wish.name, client, "", denied)
