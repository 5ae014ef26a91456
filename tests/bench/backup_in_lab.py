"""Runs inside a lab host: one backup or restore as the agent does it, through the host's own libvirt; prints its figures as JSON.

backup_in_lab.py full|increment REPOSITORY        of the domain trimtab-vm-own
backup_in_lab.py restore REPOSITORY FILE          the increment, into a new qcow2 file
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

from tests.bench.backup_client import KEY, peak_mib
from trimtab_agent.backup.repository.folder import FolderBlobs
from trimtab_agent.backup.repository.manifests import Subject
from trimtab_agent.backup.repository.reader import open_backup
from trimtab_agent.backup.repository.repository import Repository, create_repository, open_repository
from trimtab_agent.backup.restoring import restore_disk
from trimtab_agent.backup.running import BackupRequest, DiskToBackUp, run_backup
from trimtab_agent.backup.source import InstantSource
from trimtab_agent.clock import SystemClock
from trimtab_agent.hypervisor.kvm.backups import Backups
from trimtab_agent.hypervisor.kvm.connection import Connection

VM = "vm-own"


def back_up(repository: Repository, connection: Connection, backup_id: str) -> dict[str, float]:
    source = Backups(connection, instants=cast(InstantSource, None))  # nothing is filled here
    request = BackupRequest(backup_id, Subject("fleet-1", "default", VM, VM), [DiskToBackUp("vda", f"vol-{VM}", 1)])
    [disk] = run_backup(repository, source, request, on_progress=lambda _done, _total: None).disks
    if bool(disk.full_reason) != (backup_id == "bk-1"):
        raise SystemExit(f"{backup_id} is not what was to be measured: {disk.full_reason!r}")
    return {"dirty_bytes": disk.dirty_bytes, "read_bytes": disk.read_bytes}


def restore(repository: Repository, file: Path) -> dict[str, float]:
    with open_backup(repository, VM, "bk-2") as reader:
        disk = reader.disk("vda")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(file), str(disk.manifest.size_bytes)], check=True)
        written = restore_disk(disk, file, format="qcow2", on_progress=lambda _done, _total: None)
    return {"written_bytes": written}


def cpu_s() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def main() -> None:
    step, folder, *rest = sys.argv[1:]
    if step == "full":
        Path(folder).mkdir()
        create_repository(FolderBlobs(Path(folder)), KEY, fleet_id="fleet-1", project_id="", clock=SystemClock())
    connection = Connection("qemu:///system", on_open=lambda _connection: None)
    connection.start()
    if not connection.wait_until_up(30):
        raise SystemExit("libvirt does not answer")
    before, began = cpu_s(), time.monotonic()
    repository = open_repository(FolderBlobs(Path(folder)), KEY, fleet_id="fleet-1", clock=SystemClock())
    match step:
        case "restore":
            told = restore(repository, Path(rest[0]))
        case _:
            told = back_up(repository, connection, "bk-1" if step == "full" else "bk-2")
    told |= {"wall_s": time.monotonic() - began, "cpu_s": cpu_s() - before, "peak_mib": peak_mib()}
    connection.stop()
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
