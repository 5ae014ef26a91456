"""Runs inside a host of the lab: one backup or restore through the host's own libvirt, its figures as JSON on standard output.

backup_in_host.py backup REPOSITORY VM BACKUP_ID [DISK[:GENERATION]…]
                                                        also the SHA-256 of each whole export, read while the job was open
backup_in_host.py compared REPOSITORY VM BACKUP_ID [DISK[:GENERATION]…]
                                                        as `backup`, and of each disk as it is restored, without a file
backup_in_host.py slow REPOSITORY VM BACKUP_ID          as `backup`; says `begun` once it reads, and reads on after a line of input
backup_in_host.py hold - VM BACKUP_ID                   with nothing frozen: the guest's state while the instant is held, and after
backup_in_host.py die - VM BACKUP_ID                    as `hold`, but this process dies while the guest is held
backup_in_host.py die-frozen - VM BACKUP_ID             as `die`, but with the guest's file systems frozen
backup_in_host.py restore REPOSITORY VM BACKUP_ID FILE [DISK]
                                                        into a new qcow2 file; also the SHA-256 of what it then holds
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.keys import RepositoryKey
from trimtab_agent.backup.repository.manifests import Subject
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.repository.repository import Repository, create_repository, open_repository
from trimtab_agent.backup.restoring import restore_disk, served_volume
from trimtab_agent.backup.running import BackupRequest, DiskToBackUp, OnProgress, run_backup
from trimtab_agent.backup.source import DiskContent, DiskWish, Hold, Instant, InstantSource
from trimtab_agent.clock import SystemClock
from trimtab_agent.hypervisor.kvm.backups import Backups
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import PoolSpec

KEY = RepositoryKey(bytes(range(32)))


def digest_of(client: DiskContent) -> str:
    digest = hashlib.sha256()
    step = 1 << 20
    ranges = ((at, min(step, client.size_bytes - at)) for at in range(0, client.size_bytes, step))
    for _, content in client.read_pieces(ranges, step):
        digest.update(content)
    return digest.hexdigest()


class Hashed:
    """A source that also hashes each disk, at the same instant as it is copied."""

    def __init__(self, inner: Backups) -> None:
        self._inner = inner
        self.digests: dict[str, str] = {}
        self.keep_checkpoint = inner.keep_checkpoint
        self.drop_checkpoint = inner.drop_checkpoint

    @contextlib.contextmanager
    def serve(
        self,
        vm_id: str,
        wishes: Sequence[DiskWish],
        *,
        checkpoint: str,
        wants_freeze: bool,
        hold: Hold | None = None,
        scratch: PoolSpec | None = None,
    ) -> Iterator[Instant]:
        with self._inner.serve(
            vm_id, wishes, checkpoint=checkpoint, wants_freeze=wants_freeze, hold=hold, scratch=scratch
        ) as instant:
            yield instant
            for disk in instant.disks:
                self.digests[disk.name] = digest_of(disk.content)


def opened(folder: Path) -> Repository:
    blobs = FolderBlobs(folder)
    if not (folder / "config.json").exists():
        create_repository(blobs, KEY, fleet_id="fleet-1", project_id="", clock=SystemClock())
    return open_repository(blobs, KEY, fleet_id="fleet-1", clock=SystemClock())


@contextlib.contextmanager
def libvirt_here() -> Iterator[tuple[Connection, Backups]]:
    connection = Connection("qemu:///system", on_open=lambda _connection: None)
    connection.start()
    assert connection.wait_until_up(30)
    try:
        # Nothing here is used before it is filled from a backup.
        yield connection, Backups(connection, instants=cast(InstantSource, None))
    finally:
        connection.stop()


def hold(vm_id: str, backup_id: str, *, is_fatal: bool, wants_freeze: bool) -> dict[str, object]:
    with libvirt_here() as (connection, source):

        def state() -> int:
            with connection.use("look at the guest") as opened:
                return int(opened.lookupByName(f"trimtab-{vm_id}").state()[0])

        def still() -> dict[str, str]:
            if is_fatal:
                os._exit(9)
            return {"state": str(state())}

        wish = DiskWish("vda")
        with source.serve(vm_id, [wish], checkpoint=f"tt-{backup_id}", wants_freeze=wants_freeze, hold=still) as instant:
            after = state()
        source.drop_checkpoint(vm_id, f"tt-{backup_id}")
        return {"held": instant.notes["state"], "after": str(after), "consistency": instant.consistency.value}


class Slow:
    """Progress that stands still at the first read until somebody says that it may go on."""

    def __init__(self) -> None:
        self._is_let_go = False

    def __call__(self, _done: int, _total: int) -> None:
        if not self._is_let_go:
            print("begun", flush=True)  # noqa: T201
            sys.stdin.readline()
            self._is_let_go = True


def back_up(repository: Repository, vm_id: str, backup_id: str, disks: Sequence[str], *, is_slow: bool) -> dict[str, object]:
    with libvirt_here() as (_connection, backups):
        wanted = [_disk_of(vm_id, disk) for disk in disks or ["vda"]]
        request = BackupRequest(backup_id, Subject("fleet-1", "default", vm_id, vm_id), wanted)
        return _back_up(repository, Hashed(backups), request, Slow() if is_slow else lambda _done, _total: None)


def _disk_of(vm_id: str, disk: str) -> DiskToBackUp:
    name, _, generation = disk.partition(":")
    return DiskToBackUp(name, f"vol-{vm_id}" if name == "vda" else f"vol-{vm_id}-{name}", int(generation or 1))


def _back_up(repository: Repository, source: Hashed, request: BackupRequest, on_progress: OnProgress) -> dict[str, object]:
    try:
        manifest = run_backup(repository, source, request, on_progress=on_progress)
    except TrimtabError as error:
        return {"error": error.code, "message": error.message, "context": dict(error.context)}
    disk = manifest.disks[0]
    return {
        "sha256": source.digests[disk.name],
        "digests": source.digests,
        "full_reason": disk.full_reason,
        "full_reasons": {one.name: one.full_reason for one in manifest.disks},
        "dirty_bytes": disk.dirty_bytes,
        "read_bytes": disk.read_bytes,
        "base_id": manifest.base_id,
        "consistency": manifest.consistency.value,
        "notes": dict(manifest.notes),
    }


def restore(repository: Repository, vm_id: str, backup_id: str, file: Path, name: str = "vda") -> dict[str, object]:
    with open_backup(repository, vm_id, backup_id) as reader:
        disk = reader.disk(name)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(file), str(disk.manifest.size_bytes)], check=True)
        socket = file.with_suffix(".sock")
        restore_disk(disk, file, format="qcow2", on_progress=lambda _done, _total: None)
        with served_volume(file, format="qcow2", socket=socket) as client:
            return {"sha256": digest_of(client), "has_definition": reader.attachment("domain.xml").startswith(b"<domain")}


def read_back(repository: Repository, vm_id: str, backup_id: str) -> dict[str, str]:
    found = {}
    with open_backup(repository, vm_id, backup_id) as reader:
        for disk in reader.manifest.disks:
            content = bytearray(disk.size_bytes)

            def write(offset: int, piece: bytes, content: bytearray = content) -> None:
                content[offset : offset + len(piece)] = piece

            reader.disk(disk.name).copy_to(write)
            found[disk.name] = hashlib.sha256(content).hexdigest()
    return found


def main() -> None:
    verb, folder, vm_id, backup_id, *rest = sys.argv[1:]
    if verb in {"hold", "die", "die-frozen"}:
        print(json.dumps(hold(vm_id, backup_id, is_fatal=verb != "hold", wants_freeze=verb == "die-frozen")))  # noqa: T201
        return
    repository = opened(Path(folder))
    if verb == "restore":
        told = restore(repository, vm_id, backup_id, Path(rest[0]), *rest[1:])
    else:
        told = back_up(repository, vm_id, backup_id, rest, is_slow=verb == "slow")
    if verb == "compared":
        told["restored"] = read_back(repository, vm_id, backup_id)
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
