"""Checkpoints of running domains, disk by disk: one whose bitmap is missing or broken is read in full, whatever the others have.

libvirt refuses a whole job, and a whole checkpoint that it is to know again, for one disk's bitmap, and names the disk (9.0). So it is asked
again without that one, at most once for each disk.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import structlog

from trimtab_agent.backup.source import DiskWish
from trimtab_agent.hypervisor.kvm import memory_bitmaps
from trimtab_agent.hypervisor.kvm.backup_xml import PulledDisk, backup_xml, checkpoint_xml
from trimtab_agent.hypervisor.kvm.disk_sources import sources_of

log = structlog.get_logger(__name__)

PREFIX = "tt-"
_KNOW_AGAIN = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
_BROKEN_BITMAP_TEXTS = ("checkpoint inconsistent", "missing or broken bitmap", "not found in backing chain")


def begin_job(
    domain: Any, pulled: Sequence[PulledDisk], others: Sequence[str], socket: Path, marked: str | None
) -> dict[str, str]:
    """Begin the pull job, of full copies where a bitmap is broken. Return disk → why it is read in full."""
    denied: dict[str, str] = {}
    while True:
        asked = [replace(disk, base_checkpoint="") if disk.name in denied else disk for disk in pulled]
        try:
            domain.backupBegin(backup_xml(asked, socket=str(socket), others=others), marked, 0)
        except libvirt.libvirtError as error:
            detail = error.get_error_message() or ""
            broken = broken_disks(detail, [disk.name for disk in asked if disk.base_checkpoint])
            if not broken:
                raise
            denied |= dict.fromkeys(broken, f"its checkpoint is broken: {detail}")
        else:
            return denied


def broken_disks(detail: str, names: Sequence[str]) -> Sequence[str]:
    """Return which of the disks libvirt's error says has no whole bitmap, all where it names none; none for any other error. Pure."""
    if not any(text in detail for text in _BROKEN_BITMAP_TEXTS):
        return []
    return [name for name in names if f"'{name}'" in detail] or names


def unknown_here(domain: Any, wishes: Sequence[DiskWish], present: Collection[str], targets: Sequence[str]) -> Mapping[str, str]:
    """Tell libvirt of the checkpoints that increments begin at and it does not know, where QEMU has their bitmaps whole.

    Return disk → why its checkpoint cannot be used here. Bitmaps go with a guest that moves, and lie in the image of one that was stopped;
    libvirt's record of them stays on the host where they were made (9.0). It looks itself whether QEMU has them and they are not broken.
    """
    denied: dict[str, str] = {}
    for name in sorted({wish.base_checkpoint for wish in wishes} - {"", *present}):
        disks = [wish.name for wish in wishes if wish.base_checkpoint == name]
        while disks:
            others = [target for target in targets if target not in disks]
            definition = checkpoint_xml(name, disks, others=others, created_s=int(time.time()))
            try:
                domain.checkpointCreateXML(definition, _KNOW_AGAIN)
            except libvirt.libvirtError as error:
                detail = error.get_error_message() or ""
                broken = broken_disks(detail, disks) or disks
                log.info("the checkpoint cannot be used here", checkpoint=name, disks=broken, error=detail)
                denied |= dict.fromkeys(broken, f"this host does not know the checkpoint {name}")
                disks = [disk for disk in disks if disk not in broken]
            else:
                break
    return denied


def delete(domain: Any, is_deleted: Callable[[str], bool]) -> None:
    """Delete the checkpoints of ours whose name `is_deleted` takes, with their bitmaps."""
    for found in domain.listAllCheckpoints():
        name = found.getName()
        if not name.startswith(PREFIX) or not is_deleted(name):
            continue
        try:
            found.delete(0)
        except libvirt.libvirtError:
            # A bitmap is gone or broken, so there are no bits of that disk to merge into the parent; those of the others go here.
            found.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
            memory_bitmaps.drop(domain, _aliases(domain), name)


def _aliases(domain: Any) -> Sequence[str]:
    return [source.alias for source in sources_of(domain.XMLDesc(0)).values() if source.alias]
