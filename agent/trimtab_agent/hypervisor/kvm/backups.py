"""Pull backups of running domains: libvirt fixes an instant and serves it by NBD; `backup.running` copies it.

    begin: end what an earlier agent left ── freeze ── backupBegin (job and checkpoint in one transaction) ── thaw
    end:   abortJob, the normal end of a pull job

A stopped one is read by `cold_backups`, without starting anything.

A freeze is always followed by a thaw. libvirt waits 30 s for a lock when a second job is begun, so it is asked first. A checkpoint whose
bitmap is missing or marked in use (QEMU was killed) is refused by libvirt at once: then all disks are read in full and its leftovers
dropped.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import structlog

from trimtab_agent.backup.nbd import ALLOCATION, NbdClient
from trimtab_agent.backup.repository.manifests import Consistency
from trimtab_agent.backup.repository.reader import DiskReader
from trimtab_agent.backup.restoring import restore_disk
from trimtab_agent.backup.source import NVRAM, DiskWish, Hold, Instant, InstantSource, ServedDisk
from trimtab_agent.hypervisor.kvm import os_errors, state_files, volumes
from trimtab_agent.hypervisor.kvm.backup_xml import (
    PulledDisk,
    all_targets,
    backup_xml,
    bitmap_name,
    checkpoint_xml,
    disk_files,
    nvram_file,
    socket_of_job,
)
from trimtab_agent.hypervisor.kvm.cold_backups import stopped_instant
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_agent.hypervisor.kvm.domains import require
from trimtab_agent.hypervisor.kvm.identifiers import check_id
from trimtab_agent.hypervisor.kvm.pauses import GuestPauses
from trimtab_agent.hypervisor.kvm.pool_layout import PoolLayout
from trimtab_protos.errors import Conflict, NotFound, TrimtabError
from trimtab_protos.messages import PoolSpec, VolumeSpec

log = structlog.get_logger(__name__)

SOCKET_DIR = Path("/var/lib/libvirt/qemu")
"""QEMU's own directory: it binds the socket itself, as its own user."""
CHECKPOINT_PREFIX = "tt-"
_KNOW_AGAIN = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
_BROKEN_BITMAP_TEXTS = ("checkpoint inconsistent", "missing or broken bitmap", "not found in backing chain")


class Backups:
    """The `BackupSource` of this host. Thread-safe; one backup of a vm at a time is the caller's to see to."""

    def __init__(
        self,
        connection: Connection,
        *,
        refuse_if_used: Callable[[Sequence[str], str], None] = lambda _paths, _what: None,
        instants: InstantSource,
        pauses: GuestPauses | None = None,
        socket_dir: Path = SOCKET_DIR,
    ) -> None:
        """`refuse_if_used` raises Conflict where a domain of this host has one of the files as a disk."""
        self.instants = instants
        self._connection = connection
        self._refuse_if_used = refuse_if_used
        self._pauses = pauses or GuestPauses(socket_dir)
        self._socket_dir = socket_dir

    @contextlib.contextmanager
    def serve(
        self, vm_id: str, wishes: Sequence[DiskWish], *, checkpoint: str, wants_freeze: bool, hold: Hold | None = None
    ) -> Iterator[Instant]:
        """See `BackupSource.serve`."""
        socket = self._socket_dir / f"trimtab-{check_id(vm_id, 'vm_id')}-backup.sock"
        with self._connection.use("look at the domain") as connection:
            domain = require(connection, vm_id)
            is_running = bool(domain.isActive())
            if is_running:
                self._pauses.settle(domain, vm_id)
                self._end_leftover(domain, socket)
            definition = domain.XMLDesc(0)
            stored = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
            present = {found.getName() for found in domain.listAllCheckpoints()}
            if is_running:
                present |= _known_again(domain, wishes, present, all_targets(definition))
        if not is_running:
            with stopped_instant(wishes, disk_files(definition), present, socket) as instant:
                held = hold() if hold is not None else {}  # no start of it goes beside its backup
                yield replace(instant, attachments=_attachments(stored), notes={**instant.notes, **held})
            return
        pulled, denied = _to_pull(wishes, disk_files(definition), present)
        others = [target for target in all_targets(definition) if target not in {disk.name for disk in pulled}]
        consistency, notes, denied_now = self._begin(
            vm_id, pulled, others, socket, checkpoint, wants_freeze=wants_freeze, hold=hold
        )
        denied |= denied_now
        created_ms = time.time_ns() // 1_000_000 - int(notes.get("held_ms", "0"))
        try:
            with contextlib.ExitStack() as stack:
                served = [_open(stack, socket, disk, denied.get(disk.name, "")) for disk in pulled]
                yield Instant(created_ms, consistency, served, _attachments(stored), notes)
        finally:
            self._end(vm_id)

    def keep_checkpoint(self, vm_id: str, checkpoint: str) -> None:
        """See `BackupSource.keep_checkpoint`."""
        with self._connection.use("drop older checkpoints", changes=True) as connection:
            for found in require(connection, vm_id).listAllCheckpoints():
                if found.getName().startswith(CHECKPOINT_PREFIX) and found.getName() != checkpoint:
                    _delete(found)

    def drop_checkpoint(self, vm_id: str, checkpoint: str) -> None:
        """See `BackupSource.drop_checkpoint`."""
        with self._connection.use("drop a checkpoint", changes=True) as connection:
            for found in require(connection, vm_id).listAllCheckpoints():
                if found.getName() == checkpoint:
                    _delete(found)

    def restore_volume(
        self, volume: VolumeSpec, pool: PoolSpec, disk: DiskReader, *, on_progress: Callable[[int, int], None]
    ) -> int:
        """See `BackupSource.restore_volume`. Nothing half restored stays behind."""
        layout = PoolLayout.of(pool)
        self._refuse_if_used(volumes.names_of(volume.volume_id, layout), f"volume {volume.volume_id}")
        volumes.delete(volume.volume_id, layout)  # of an attempt that broke off
        volumes.ensure(volume, layout)
        try:
            return restore_disk(
                disk,
                Path(layout.volume(volume.volume_id, volume.format)),
                format=volume.format.value,
                on_progress=on_progress,
            )
        except BaseException as error:
            with contextlib.suppress(TrimtabError):
                volumes.delete(volume.volume_id, layout)
            if isinstance(error, OSError):
                raise os_errors.from_os(error, doing=f"restore volume {volume.volume_id}") from error
            raise

    def restore_nvram(self, vm_id: str, pool: PoolSpec, content: bytes) -> None:
        """See `BackupSource.restore_nvram`."""
        state_files.restore_nvram(vm_id, pool, content)

    def _begin(
        self,
        vm_id: str,
        pulled: Sequence[PulledDisk],
        others: Sequence[str],
        socket: Path,
        checkpoint: str,
        *,
        wants_freeze: bool,
        hold: Hold | None,
    ) -> tuple[Consistency, Mapping[str, str], Mapping[str, str]]:
        """Begin the job; where a bitmap is broken, one of full copies. Return consistency, notes, and why disks are read in full."""
        names = [disk.name for disk in pulled]
        marked = checkpoint_xml(checkpoint, names, others=others)
        with self._connection.use("begin the backup", changes=True) as connection:
            domain = require(connection, vm_id)
            notes: dict[str, str] = {}
            is_frozen = wants_freeze and freeze(domain, notes)
            stands = self._pauses.paused(domain, vm_id) if hold is not None and not is_frozen else contextlib.nullcontext()
            began = time.monotonic()
            try:
                with stands:
                    denied = _begin_job(domain, pulled, others, socket, marked)
                    notes |= hold() if hold is not None else {}
            finally:
                if is_frozen:
                    thaw(domain)
                    notes["frozen_ms"] = str(int((time.monotonic() - began) * 1000))
        return Consistency.FILESYSTEM if is_frozen else Consistency.CRASH, notes, denied

    def _end(self, vm_id: str) -> None:
        # A guest that stopped meanwhile has ended its job itself.
        with contextlib.suppress(TrimtabError), self._connection.use("end the backup", changes=True) as connection:
            domain = require(connection, vm_id)
            if domain.isActive() and domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
                domain.abortJob()

    def _end_leftover(self, domain: Any, socket: Path) -> None:
        """End a job of ours that an earlier agent began. Conflict: anything else is under way."""
        if domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE:
            return
        try:
            job = domain.backupGetXMLDesc(0)
        except libvirt.libvirtError:
            job = "<none/>"
        if socket_of_job(job) != str(socket):
            raise Conflict("vm-busy", "another job of this domain is under way, such as a migration; try again when it has ended")
        log.info("ending a backup job that an earlier agent left", domain=domain.name())
        domain.abortJob()


def _begin_job(domain: Any, pulled: Sequence[PulledDisk], others: Sequence[str], socket: Path, marked: str) -> dict[str, str]:
    """Begin the pull job; where a bitmap is broken, one of full copies. Return why disks are read in full."""
    try:
        domain.backupBegin(backup_xml(pulled, socket=str(socket), others=others), marked, 0)
    except libvirt.libvirtError as error:
        detail = error.get_error_message() or ""
        if not any(text in detail for text in _BROKEN_BITMAP_TEXTS):
            raise
        _drop_broken(domain)
        full = [PulledDisk(disk.name, disk.scratch) for disk in pulled]
        domain.backupBegin(backup_xml(full, socket=str(socket), others=others), marked, 0)
        return {disk.name: f"its checkpoint is broken: {detail}" for disk in pulled if disk.base_checkpoint}
    return {}


def _known_again(domain: Any, wishes: Sequence[DiskWish], present: Collection[str], targets: Sequence[str]) -> set[str]:
    """Tell libvirt of the checkpoints that increments begin at and it does not know, where QEMU has their bitmaps whole; return those.

    Bitmaps go with a guest that moves, and lie in the image of one that was stopped; libvirt's record of them stays on the host where
    they were made (9.0). It looks itself whether QEMU has them and they are not broken; else the disk is read in full.
    """
    found = set()
    for name in sorted({wish.base_checkpoint for wish in wishes} - {"", *present}):
        disks = [wish.name for wish in wishes if wish.base_checkpoint == name]
        others = [target for target in targets if target not in disks]
        definition = checkpoint_xml(name, disks, others=others, created_s=int(time.time()))
        try:
            domain.checkpointCreateXML(definition, _KNOW_AGAIN)
        except libvirt.libvirtError as error:
            log.info("the checkpoint cannot be used here", checkpoint=name, error=error.get_error_message())
        else:
            found.add(name)
    return found


def _attachments(stored: str) -> Mapping[str, bytes]:
    """Return the definition and, of a vm that boots by UEFI, its variables: QEMU writes them through to their file."""
    found = {"domain.xml": stored.encode()}
    file = nvram_file(stored)
    if file:
        try:
            found[NVRAM] = Path(file).read_bytes()
        except FileNotFoundError:
            log.warning("no UEFI variables to back up", file=file)
    return found


def _to_pull(
    wishes: Sequence[DiskWish], files: Mapping[str, tuple[str, str]], present: set[str]
) -> tuple[list[PulledDisk], dict[str, str]]:
    pulled, denied = [], {}
    for wish in wishes:
        if wish.name not in files:
            raise NotFound("disk-not-found", f"the domain has no disk {wish.name}", disk=wish.name)
        file, format = files[wish.name]
        if format != "qcow2":
            raise Conflict("disk-not-qcow2", f"{wish.name} is {format}; changes can be followed on qcow2 only", disk=wish.name)
        base = wish.base_checkpoint
        if base and base not in present:
            denied[wish.name] = f"this host does not know the checkpoint {base}"
            base = ""
        path = Path(file)
        pulled.append(PulledDisk(wish.name, str(path.parent / f".{path.stem}.scratch"), base))
    return pulled, denied


def _open(stack: contextlib.ExitStack, socket: Path, disk: PulledDisk, denied: str) -> ServedDisk:
    bitmap = f"qemu:dirty-bitmap:{bitmap_name(disk.name)}" if disk.base_checkpoint and not denied else ""
    contexts = [ALLOCATION, *([bitmap] if bitmap else [])]
    client = stack.enter_context(NbdClient.connect(socket, disk.name, contexts=contexts))
    return ServedDisk(disk.name, client, bitmap, denied)


def freeze(domain: Any, notes: dict[str, str]) -> bool:
    try:
        domain.fsFreeze()
    except libvirt.libvirtError as error:
        notes["downgrade"] = f"the guest's filesystems were not frozen: {error.get_error_message()}"
        # It may have frozen some and then answered too late.
        thaw(domain)
        return False
    return True


def thaw(domain: Any) -> None:
    try:
        domain.fsThaw()
    except libvirt.libvirtError as error:
        log.debug("thaw", error=error.get_error_message())


def _drop_broken(domain: Any) -> None:
    for found in domain.listAllCheckpoints():
        if found.getName().startswith(CHECKPOINT_PREFIX):
            _delete(found)


def _delete(checkpoint: Any) -> None:
    try:
        checkpoint.delete(0)
    except libvirt.libvirtError:
        # Its bitmap is gone or broken, so there are no bits to merge into the parent.
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
