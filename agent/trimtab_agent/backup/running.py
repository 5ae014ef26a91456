"""One backup from beginning to end: an instant of the vm's disks into the repository.

    base: the last *listed* backup of the vm ── wishes per disk ── writer announced ── instant fixed ── disks copied ── listed
    ── keep the checkpoint.  Any failure before "listed": drop the checkpoint; the next run goes from the older one.

Which checkpoint an increment begins at is read from the repository, never from libvirt: a run that failed leaves a newer checkpoint
there that no backup belongs to.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from trimtab_agent.backup.copying import copy_disk
from trimtab_agent.backup.repository import errors
from trimtab_agent.backup.repository.manifests import Consistency, DiskManifest, Manifest, Subject
from trimtab_agent.backup.repository.repository import Repository
from trimtab_agent.backup.repository.writer import BackupWriter, begin_backup
from trimtab_agent.backup.source import BackupSource, DiskWish, Hold, Instant, ServedDisk
from trimtab_protos.errors import Conflict, TrimtabError
from trimtab_protos.messages import PoolSpec

FIRST = "first backup"
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class DiskToBackUp:
    name: str
    volume_id: str
    generation: int
    """Of the volume's content: another one than the base's means that it was reverted or restored."""


@dataclass(frozen=True, slots=True)
class BackupRequest:
    backup_id: str
    """New for each attempt: a session that prune ended cannot be taken up again."""
    subject: Subject
    disks: Sequence[DiskToBackUp]
    wants_freeze: bool = True
    needs_filesystem: bool = False
    """Fail rather than keep a backup that is only crash-consistent."""
    needs_application: bool = False
    """Fail rather than keep one for which the guest's hook did not hold its applications; those of a vm that does not run are at rest."""
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    hold: Hold | None = None
    """Of a vm that is backed up at one instant with others."""
    scratch: PoolSpec | None = None
    """A pool of files, for what guests overwrite meanwhile of disks that are no files."""


def run_backup(repository: Repository, source: BackupSource, request: BackupRequest, *, on_progress: OnProgress) -> Manifest:
    """Return the manifest of the listed backup. Idempotent: one that is listed under this id is returned.

    `on_progress` gets bytes done, and in all of the disks that were begun; what it raises ends the backup, and nothing is listed.
    Conflict `backup-not-quiesced`, `backup-not-hooked` where the request demands more than the guest gave.
    """
    vm_id = request.subject.vm_id
    listed = repository.list_backups(vm_id).manifests
    done = next((manifest for manifest in listed if manifest.backup_id == request.backup_id), None)
    if done is not None:
        _keep(source, vm_id, done)
        return done
    base = listed[-1] if listed else None
    try:
        manifest = _run(repository, source, request, base, on_progress)
    except TrimtabError as error:
        if base is None or not errors.is_damage(error):
            raise
        # A page of the base: the writer has put that on record, so that this time what it named is read from the disk.
        manifest = _run(repository, source, request, base, on_progress)
    _keep(source, vm_id, manifest)
    return manifest


def _run(
    repository: Repository, source: BackupSource, request: BackupRequest, base: Manifest | None, on_progress: OnProgress
) -> Manifest:
    vm_id, checkpoint = request.subject.vm_id, checkpoint_name(request.backup_id)
    bases = {disk.name: base_of(disk, base) for disk in request.disks}
    wishes = [DiskWish(name, found.checkpoint if found else "") for name, (found, _) in bases.items()]
    with _begin(repository, request, base) as writer:
        try:
            with source.serve(
                vm_id,
                wishes,
                checkpoint=checkpoint,
                wants_freeze=request.wants_freeze,
                hold=request.hold,
                scratch=request.scratch,
            ) as instant:
                _refuse_less_than_demanded(request, instant)
                marked = checkpoint if instant.checkpoint is None else instant.checkpoint
                disks = list[DiskManifest]()
                for served in instant.disks:
                    before = sum(disk.read_bytes for disk in disks)
                    disks.append(_copy(writer, request, served, bases[served.name], marked, _after(before, on_progress)))
            for name, content in {**instant.attachments, **request.attachments}.items():
                writer.attach(name, content)
            notes = {**instant.notes, **request.notes}
            return writer.commit(disks, created_ms=instant.created_ms, consistency=instant.consistency, notes=notes)
        except BaseException:
            with contextlib.suppress(TrimtabError):  # left behind, it costs tracking until the next backup drops it
                source.drop_checkpoint(vm_id, checkpoint)
            raise


def _after(before: int, on_progress: OnProgress) -> OnProgress:
    return lambda done, total: on_progress(before + done, before + total)


def _keep(source: BackupSource, vm_id: str, manifest: Manifest) -> None:
    checkpoint = next((disk.checkpoint for disk in manifest.disks if disk.checkpoint), "")
    if checkpoint:
        source.keep_checkpoint(vm_id, checkpoint)


def checkpoint_name(backup_id: str) -> str:
    return f"tt-{backup_id}"


def base_of(disk: DiskToBackUp, base: Manifest | None) -> tuple[DiskManifest | None, str]:
    """Return what an increment of this disk builds on, or why it cannot: then all of the disk is read."""
    if base is None:
        return None, FIRST
    found = base.disk(disk.name)
    if found is None:
        return None, f"the disk was added after {base.backup_id}"
    if found.volume_id != disk.volume_id:
        return None, f"it is another volume than in {base.backup_id}"
    if found.generation != disk.generation:
        return None, f"its content was reverted or restored after {base.backup_id}"
    if not found.checkpoint:
        return None, f"{base.backup_id} left no checkpoint of it"
    return found, ""


def _begin(repository: Repository, request: BackupRequest, base: Manifest | None) -> BackupWriter:
    base_id = base.backup_id if base else None
    try:
        return begin_backup(repository, request.subject, request.backup_id, base_id=base_id)
    except TrimtabError as error:
        if base_id is None or not (errors.is_damage(error) or error.code == "backup-not-found"):
            raise
        # Forgotten since it was listed: chunks are found again, only the reading costs.
        return begin_backup(repository, request.subject, request.backup_id)


def _refuse_less_than_demanded(request: BackupRequest, instant: Instant) -> None:
    why = instant.notes.get("downgrade")
    if (request.needs_filesystem or request.needs_application) and instant.consistency == Consistency.CRASH:
        raise Conflict(
            "backup-not-quiesced",
            f"the policy demands filesystem consistency and the guest did not give it: {why or 'the guest was not asked'}; install "
            "qemu-guest-agent in the guest or let the policy allow crash consistency",
        )
    if request.needs_application and instant.consistency != Consistency.APPLICATION and not instant.is_at_rest:
        raise Conflict(
            "backup-not-hooked",
            f"the policy demands application consistency and the guest did not give it: {why or instant.not_asked}; see to its "
            "hook or let the policy allow filesystem consistency",
        )


def _copy(
    writer: BackupWriter,
    request: BackupRequest,
    served: ServedDisk,
    base: tuple[DiskManifest | None, str],
    checkpoint: str,
    on_progress: OnProgress,
) -> DiskManifest:
    wanted = next(disk for disk in request.disks if disk.name == served.name)
    found, reason = base
    if found is not None and writer.base is None:
        found, reason = None, "its base was forgotten meanwhile"
    if found is not None and not served.bitmap:
        found, reason = None, served.denied or "what changed is not known"
    try:
        disk = writer.open_disk(served.name, served.content.size_bytes, base=found)
    except Conflict as refused:
        found, reason = None, refused.message
        disk = writer.open_disk(served.name, served.content.size_bytes)
    copied = copy_disk(served.content, disk, bitmap=served.bitmap if found else None, on_progress=on_progress)
    return writer.finish(
        disk,
        volume_id=wanted.volume_id,
        generation=wanted.generation,
        checkpoint=checkpoint,
        full_reason=reason,
        dirty_bytes=copied.dirty_bytes,
    )
