"""Backups of one repository into another of the same fleet, each under its own keys.

Chunks are read, checked against their ids, and written by the other repository's own writer: what it has already is not stored again, a
backup exists there only once its manifest is listed, last, and a run that broke off goes on with the first backup that is not listed;
the chunks that it had stored by then are found again. What the source forgot stays in the copy until it is pruned by its own rule.
"""

import contextlib
from collections.abc import Callable

from trimtab_agent.backup.repository.manifests import DiskManifest, Manifest
from trimtab_agent.backup.repository.reader import BackupReader, open_backup
from trimtab_agent.backup.repository.repository import Repository
from trimtab_agent.backup.repository.sealing import HOLE
from trimtab_agent.backup.repository.writer import BackupWriter, begin_backup
from trimtab_protos.errors import Conflict, TrimtabError

OnProgress = Callable[[int, int], None]


def replicate(source: Repository, target: Repository, *, on_progress: OnProgress) -> tuple[int, int]:
    """Copy every backup that the target does not list, oldest first; return how many backups, and bytes that were read.

    `on_progress` gets bytes read so far and at most in all; what it raises ends the run and lists nothing more. Conflict where both are
    one repository; a backup with a damaged chunk ends the run: it is never listed, and the source says which when it is verified.
    """
    if source.config.repository_id == target.config.repository_id:
        raise Conflict("repository-is-itself", "a repository is not copied into itself; name another one with `--to`", field="to")
    has = {(one.subject.vm_id, one.backup_id) for one in target.list_backups().manifests}
    missing = [one for one in source.list_backups().manifests if (one.subject.vm_id, one.backup_id) not in has]
    total, done = sum(disk.size_bytes for one in missing for disk in one.disks), 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, max(total, done))

    for manifest in missing:
        with open_backup(source, manifest.subject.vm_id, manifest.backup_id) as reader, contextlib.ExitStack() as stack:
            base = _open_base(stack, source, target, manifest)
            base_id = base.manifest.backup_id if base is not None else None
            with begin_backup(target, manifest.subject, manifest.backup_id, base_id=base_id) as writer:
                disks = [_copy_disk(reader, base, writer, disk, progress) for disk in manifest.disks]
                for file in manifest.attachments:
                    writer.attach(file.name, reader.content_of(file))
                writer.commit(disks, created_ms=manifest.created_ms, consistency=manifest.consistency, notes=manifest.notes)
    return len(missing), done


def _open_base(stack: contextlib.ExitStack, source: Repository, target: Repository, manifest: Manifest) -> BackupReader | None:
    """Return the backup that this one is an increment of, where both repositories still list it."""
    vm_id, base_id = manifest.subject.vm_id, manifest.base_id
    if not base_id or all(one.backup_id != base_id for one in target.list_backups(vm_id).manifests):
        return None
    try:
        return stack.enter_context(open_backup(source, vm_id, base_id))
    except TrimtabError as error:
        if error.retryable:
            raise
        return None  # forgotten or damaged in the source: then all of it is read


def _copy_disk(
    reader: BackupReader, base: BackupReader | None, writer: BackupWriter, disk: DiskManifest, progress: Callable[[int], None]
) -> DiskManifest:
    old = base.manifest.disk(disk.name) if base is not None else None
    kept = writer.base.disk(disk.name) if writer.base is not None else None
    is_alike = old is not None and kept is not None and old.size_bytes == kept.size_bytes == disk.size_bytes
    if not is_alike or kept is None or kept.chunk_bytes != disk.chunk_bytes:
        kept = None
    before = base.disk(disk.name) if base is not None and kept is not None else None
    content, written = (
        reader.disk(disk.name),
        writer.open_disk(disk.name, disk.size_bytes, base=kept, chunk_bytes=disk.chunk_bytes),
    )
    repairs = set(written.repairs())
    for chunk in range(disk.chunk_count):
        id = content.id_of(chunk)
        if before is not None and chunk not in repairs and before.id_of(chunk) == id:
            continue
        if id == HOLE:
            written.put_holes(chunk, chunk + 1)
        else:
            written.put(chunk, content.content_of(id))
            progress(disk.length_of(chunk))
    return writer.finish(
        written,
        volume_id=disk.volume_id,
        generation=disk.generation,
        checkpoint=disk.checkpoint,
        full_reason=disk.full_reason,
        dirty_bytes=disk.dirty_bytes,
    )
