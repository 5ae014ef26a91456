"""Runs inside a lab host and may be killed at any instant: one backup of a real domain as the agent makes it, or a prune beside it.

    backup_victim.py FOLDER LANE VM BACKUP_ID      FOLDER holds `repository`, LANE `pid` and `digests`
    backup_victim.py FOLDER LANE prune             LANE holds `pruner`, the process id of this one

What a disk held at the instant is in `digests`, synced, before the backup can be listed: whoever finds it listed knows what it must hold.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from tests.lab.backup_in_host import digest_of, opened
from trimtab_agent.backup.repository.manifests import Subject
from trimtab_agent.backup.repository.prune import prune
from trimtab_agent.backup.running import BackupRequest, DiskToBackUp, run_backup
from trimtab_agent.backup.source import DiskWish, Hold, Instant, InstantSource
from trimtab_agent.hypervisor.kvm.backups import Backups
from trimtab_agent.hypervisor.kvm.connection import Connection
from trimtab_protos.errors import TrimtabError
from trimtab_protos.messages import PoolSpec


class Journaled(Backups):
    journal: Path
    backup_id: str

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
        with super().serve(
            vm_id, wishes, checkpoint=checkpoint, wants_freeze=wants_freeze, hold=hold, scratch=scratch
        ) as instant:
            yield instant
            [disk] = instant.disks
            with self.journal.open("a") as file:
                file.write(f"{self.backup_id} {digest_of(disk.content)}\n")
                file.flush()
                os.fsync(file.fileno())


def back_up(folder: Path, lane: Path, vm_id: str, backup_id: str) -> None:
    (lane / "pid").write_text(str(os.getpid()))
    connection = Connection("qemu:///system", on_open=lambda _connection: None)
    connection.start()
    if not connection.wait_until_up(30):
        raise SystemExit("libvirt does not answer")
    source = Journaled(connection, instants=cast(InstantSource, None))  # nothing is filled here
    source.journal, source.backup_id = lane / "digests", backup_id
    request = BackupRequest(backup_id, Subject("fleet-1", "default", vm_id, vm_id), [DiskToBackUp("vda", f"vol-{vm_id}", 1)])
    run_backup(opened(folder / "repository"), source, request, on_progress=lambda _done, _total: None)
    connection.stop()


def prune_all(folder: Path, lane: Path) -> None:
    repository = opened(folder / "repository")
    (lane / "pruner").write_text(str(os.getpid()))
    try:
        prune(repository, grace_s=0)
    except TrimtabError as error:
        if error.code != "prune-is-running":  # that of another lane, or of one that was killed
            raise


def main() -> None:
    folder, lane, subject, *rest = sys.argv[1:]
    if subject == "prune":
        prune_all(Path(folder), Path(lane))
    else:
        back_up(Path(folder), Path(lane), subject, *rest)


if __name__ == "__main__":
    main()
